"""Found by Hydra, which looks for packages in hydra_plugins: this file makes it one."""
