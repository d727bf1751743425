"""The command line: ``lightning-ft train | evaluate | predict | compare | merge | export``. The only users of Hydra."""
