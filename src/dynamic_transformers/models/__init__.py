"""The models. architectures/ has a record of each; the other files are what an exported model carries.

configuration.py has the configurations, modeling.py the backbone that the routed models share, routing.py how
a block runs on selected tokens, cache.py keys and values, selection.py and rules.py who is selected, state.py
thresholds and β; mod.py, sdt.py and stt.py the routers, language_model.py and classification.py the heads.
Importing this package imports none of them.
"""
