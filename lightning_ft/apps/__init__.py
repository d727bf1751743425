"""The command line: ``lightning-ft train | evaluate | predict | check | compare | merge | export``.

The only users of Hydra.
"""
