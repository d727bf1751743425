"""The command line: ``lightning-ft train | evaluate | predict``. The only users of Hydra."""
