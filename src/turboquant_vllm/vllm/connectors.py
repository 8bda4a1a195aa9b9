"""Which of vLLM's KV connectors may take pages of this cache elsewhere and back; without vLLM."""

from __future__ import annotations

from typing import Any

__all__ = ["CONNECTORS", "why_not_connectors"]

# They move the bytes of whole blocks, and have moved them before a step begins.
CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "NixlConnector", "NixlPullConnector", "NixlPushConnector")
_SEVERAL = "MultiConnector"


def why_not_connectors(kv_transfer_config: Any) -> str:
    """Why vLLM's ``kv_transfer_config`` has a connector that does not fit; empty where all do, or there is none."""
    if kv_transfer_config is None or kv_transfer_config.kv_connector is None:
        return ""
    names = [kv_transfer_config.kv_connector]
    if names == [_SEVERAL]:
        names = [one.get("kv_connector") for one in kv_transfer_config.kv_connector_extra_config.get("connectors", [])]
    others = [str(name) for name in names if name not in CONNECTORS]
    if not others:
        return ""
    return (
        f"the TQ4 backend needs a KV connector that moves whole blocks, before a step begins: {', '.join(CONNECTORS)}, or a "
        f"{_SEVERAL} of these; got {', '.join(others)}"
    )
