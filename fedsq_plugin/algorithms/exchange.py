"""Exchange: which roles of the state travel between client and server."""

from __future__ import annotations

from ..federation.roles import Role

EXCHANGES: dict[str, frozenset[Role]] = {"all": frozenset(Role)}
