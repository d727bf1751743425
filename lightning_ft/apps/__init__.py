"""The command line: ``lightning-ft train | evaluate | predict | merge | export``. The only users of Hydra."""
