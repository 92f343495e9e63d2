"""From sources of documents to packed blocks of tokens: read, split, tokenize, mix, pack, write, load."""
