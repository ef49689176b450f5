"""A secured cluster for tests: certificates, secret and keys in one directory, and what its clients show."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import yaml

from deploy.access import Access
from deploy.certificates import make_all
from router.access.keys import KeyEntry, KeyFile, new_key, read_keys, write_keys


class Secured:
    def __init__(self, directory: Path) -> None:
        make_all(directory, [], 30)
        self.directory = directory
        self.key_file = directory / "keys.yaml"
        write_keys(self.key_file, KeyFile(keys=()))
        section = yaml.safe_load((directory / "security.yaml").read_text())["security"]
        self.security: dict[str, Any] = {**section, "api_keys": str(self.key_file)}
        self.ca = (directory / "public-ca.crt").read_bytes()
        self.secrets: list[str] = [(directory / "cluster.secret").read_text().strip()]

    def add_key(self, tenant: str, **fields: Any) -> Access:
        key, key_id, sha256 = new_key(secrets.token_bytes(38))
        entry = KeyEntry.model_validate({"id": key_id, "sha256": sha256, "tenant": tenant, **fields})
        write_keys(self.key_file, KeyFile(keys=(*read_keys(self.key_file).keys, entry)))
        self.secrets.append(key)
        return self.access(key)

    def revoke(self, access: Access) -> None:
        key_id = access.api_key.split("_")[1]
        write_keys(self.key_file, KeyFile(keys=tuple(k for k in read_keys(self.key_file).keys if k.id != key_id)))

    def access(self, api_key: str = "") -> Access:
        return Access(ca=self.ca, api_key=api_key)
