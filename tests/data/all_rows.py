"""Rows of a source, whatever shards it is read in."""

from dynamic_transformers.data.sources import read_shard, shards_of


def read_records(source):
    """The rows of `source.split`."""
    for shard in shards_of(source):
        if shard.split != "validation":
            yield from read_shard(source, shard)
