"""Lets any Hydra app use our groups: ``method@callbacks.fine_tuning: lora`` in its defaults list."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from lightning_ft.apps.paths import conf_dir


class LightningFTSearchPath(SearchPathPlugin):
    """Appends our conf/, so that an app's own groups come first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """See SearchPathPlugin."""
        search_path.append(provider="lightning_ft", path=f"file://{conf_dir()}")
