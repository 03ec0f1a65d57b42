"""Configuration files: one INI file per daemon, and one for the command line; read once, checked whole.

A wrong field is an error that names file, section and field, before anything was started. Secrets are never
in these files: ``password_file`` names a file of mode 0600 or stricter.

``/etc/imgstorage/{frontend,nas,vm,client}.conf`` are the defaults; ``etc/`` has commented examples.
"""

from imgstorage.config.broker import Broker
from imgstorage.config.client import CONFIG_DIR, ClientConfig, client_config_path, load_client, sandbox_note
from imgstorage.config.hosts import (
    ContainerConfig,
    DaemonConfig,
    FrontendConfig,
    NasConfig,
    load_container,
    load_frontend,
    load_nas,
)

__all__ = [
    "CONFIG_DIR",
    "Broker",
    "ClientConfig",
    "ContainerConfig",
    "DaemonConfig",
    "FrontendConfig",
    "NasConfig",
    "client_config_path",
    "load_client",
    "load_container",
    "load_frontend",
    "load_nas",
    "sandbox_note",
]
