"""Where processes that run models listen, by application: in Ray's own key-value store.

Not asked of Ray Serve: a handle's application stays in its process's long poll for ever, and each
poll names them all, so a market whose models come and go would slow Serve's controller down.
"""

from ray.experimental import internal_kv

NAMESPACE = b"market"


def publish(app_name: str, entry: bytes) -> None:
    """Say where an application's process listens; the last word counts."""
    internal_kv._internal_kv_put(app_name, entry, overwrite=True, namespace=NAMESPACE)


def find(app_name: str) -> bytes | None:
    """What was published last, perhaps by a process that is no more."""
    found: bytes | None = internal_kv._internal_kv_get(app_name, namespace=NAMESPACE)
    return found


def forget(app_name: str) -> None:
    """The application is gone."""
    internal_kv._internal_kv_del(app_name, namespace=NAMESPACE)
