"""Published methods to compare with, written from their formulas, over the same engine, records and FLOP count.

``PEERS[name].make(setting)`` is what ``demo.generate.sample(make_run=...)`` takes.
"""

from . import (
    delta_dit,
    easycache,
    fewer_steps,
    interval,
    magcache,
    pab,
    random_schedule,
    scope_predictors,
    taylorseer,
    teacache,
)
from .base import REGIMES, MakeRun, Peer, PeerRun

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        teacache.PEER,
        easycache.PEER,
        magcache.PEER,
        taylorseer.LITE,
        taylorseer.PER_LAYER,
        pab.PEER,
        delta_dit.PEER,
        scope_predictors.MOMENTUM,
        scope_predictors.AUTO,
        interval.PEER,
        fewer_steps.PEER,
        random_schedule.PEER,
    )
}

__all__ = ["PEERS", "REGIMES", "MakeRun", "Peer", "PeerRun"]
