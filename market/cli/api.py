"""HTTP to the market with a key; the CLI does nothing else."""

import os
import time
from typing import TYPE_CHECKING, Any

from market.config import Config
from market.errors import Conflict, InvalidKey, InvalidRequest, MarketError, NotFound

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 90.0
# A gateway that died is back after so long; until then nobody may be listening.
RESTART_S = 30.0
RESTART_POLL_S = 0.5


def request(method: str, path: str, **arguments: Any) -> Any:
    """Call ``/market/v1`` as the operator (or with MARKET_API_KEY) and return the JSON answer.

    Raises MarketError with the server's message, or one that says how to reach a server.
    """
    return fetch(method, path, **arguments).json()


def fetch(
    method: str, path: str, timeout_s: float | None = TIMEOUT_S, **arguments: Any
) -> "httpx.Response":
    """Like ``request``, but the answer as it came; ``timeout_s`` None waits as long as it takes."""
    import httpx

    config = Config.from_env()
    headers = {"authorization": f"Bearer {operator_key(config)}"}
    url = f"{config.url}/market/v1{path}"
    until_s = time.monotonic() + RESTART_S
    while True:
        try:
            response = httpx.request(method, url, headers=headers, timeout=timeout_s, **arguments)
        except httpx.TransportError as error:
            refused = isinstance(error, httpx.ConnectError)
            if not refused or time.monotonic() > until_s or not _runs_here(config):
                raise unreachable(config, error) from None
            time.sleep(RESTART_POLL_S)
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"{url!r} is no address: {error}") from None
        else:
            raise_for_error(response)
            return response


def _runs_here(config: Config) -> bool:
    """Whether this machine's market runs, so that its gateway can only be starting again."""
    from market.cluster.node import load_head

    return load_head(config.state_dir) is not None


def raise_for_error(response: "httpx.Response") -> None:
    """Raise the server's error, if it is one."""
    if response.is_success:
        return
    kinds = {400: InvalidRequest, 401: InvalidKey, 404: NotFound, 409: Conflict}
    kind = kinds.get(response.status_code, MarketError)
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status_code}: {response.text[:200]}"
    raise kind(message)


def unreachable(config: Config, error: Exception) -> MarketError:
    """What to do when nothing answers."""
    return MarketError(
        f"no market answers at {config.url} ({type(error).__name__}); start one with: market up"
    )


def operator_key(config: Config) -> str:
    """MARKET_API_KEY, or the key that ``market up`` made. Raises InvalidKey."""
    if key := _key_given():
        return key
    try:
        return config.operator_key_file.read_text().strip()
    except FileNotFoundError:
        raise InvalidKey(
            f"no key: set MARKET_API_KEY, or run market up (it makes {config.operator_key_file})"
        ) from None


def tenant_key(config: Config) -> str:
    """MARKET_API_KEY, or the key that ``market keys create`` kept. Raises InvalidKey."""
    if key := _key_given():
        return key
    try:
        return config.chat_key_file.read_text().strip()
    except FileNotFoundError:
        raise InvalidKey(
            "no tenant key: set MARKET_API_KEY, or run: market keys create --tenant NAME"
        ) from None


def _key_given() -> str | None:
    """MARKET_API_KEY, if it is set. Raises InvalidKey for what no header can hold."""
    key = os.environ.get("MARKET_API_KEY")
    if key and not (key.isascii() and key.isprintable()):
        raise InvalidKey("MARKET_API_KEY is no key: it has characters that are in none")
    return key
