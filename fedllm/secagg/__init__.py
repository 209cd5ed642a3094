"""Secure aggregation: the server learns the sum of the sites' integer vectors mod 2^32, and nothing else about them.

Double masking on the complete graph after Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving
Machine Learning" (CCS 2017), figure 4, with its steps against an active adversary: the server may do anything, together
with up to c colluding sites. Steps are pure of I/O: a request goes in, an answer comes out, or a FedllmError and
nothing has changed. `session` is what all agree on, `masking` makes masks, `participant` is a site, `aggregator` the
server.

**What hides a vector.** A site uploads x_i + PRG(b_i) + sum over peers j of ±PRG(k_ij). b_i is its own secret. k_ij
comes from the mask keys s_i and s_j, and cancels in the sum. Both b_i and s_i are shared t of n
(`fedllm.crypto.shamir`). For a site whose upload is in the sum, the others reveal shares of b_i. For one that dropped
out, they reveal shares of s_i, so that its peers' pairwise masks come off. Whoever had both would have x_i.

**Exchanges a round.** Sharing keys needs nothing of the round before, so the `KeyShares` of round r+1 travel with the
`MaskedInput` of round r:

    1. MaskedInputRequest  ->  MaskedInput (and KeyShares of the next round)
    2. ConsistencyCheck    ->  UnmaskingShares if nobody dropped out: two exchanges. Otherwise ConsistencySignature, and
    3. UnmaskingRequest    ->  UnmaskingShares: three exchanges.

Once a run, `AdvertiseKeys` and the KeyShares of round 1 come first; both can travel with the run's preparation.

**Why mask keys of one round.** A mask key that lived for a run would be revealed by its owner's first dropout. It opens
the pairwise masks of every earlier round too. b_i of those rounds is revealed already, if the site survived them. So
the server could read all that site's earlier uploads. Therefore b_i and s_i are drawn for one round. The key that
shares are sealed with lives as long as the process and is never shared.

**Why one list a round.** A site answers one ConsistencyCheck a round, whichever path it leads to, and for each peer
that list says which of the two shares comes out. With n participants, c of whom collude, the server can get t shares of
both secrets of a peer only if two groups of honest sites answered different lists: 2(t - c) <= n - c. Every site
demands 2t > n + c, which excludes it, and t - c >= 2, so that no sum holds a single honest upload. This also covers a
list with dropouts shown to some and one without to others; different participants shown to different sites (pairwise
masks then do not cancel, or only within one group of at least t - c honest sites); and different lists of advertised
keys (nothing of one opens anything of the other: the digest is part of every key and signature). The signatures on a
list with dropouts are for the sites: t of them prove that no other list can have enough, before the first mask key is
revealed.

**Why one request a round.** The server chooses what every site computes from. If it sent one site the true adapter and
the others one at which nothing is learned, the sum would be that site's vector alone (Pasquini et al., "Eluding Secure
Aggregation in Federated Learning via Model Inconsistency", CCS 2022). So what is common to all sites of a round
(`common_digest`: the task, with plan, start values and record, and the signed mask keys) is part of every mask's key,
of the signatures on the list of survivors, and of what is revealed. Sites that were asked for different things are to
each other like sites with different participants: only a group of at least t, with colluders, that was asked for one
and the same can be opened, and it is summed by itself.

**Why state in memory.** Whatever a site holds for a round dies with its process: a restart is a dropout. It cannot be
made to answer twice, for nothing is left to answer with; its new key is not in the old list of advertised keys. From
the next round on it takes part again with new AdvertiseKeys.

**What this does not do.** A site may upload nonsense (no input is proved). A site that shares wrong shares, or a server
that alters messages, can stop a round. Sealed shares are authenticated by their key alone, so one that does not open
tells nobody which of the two it was. Uploads and revealed shares are not signed here: only the server relies on them,
and the transport's envelope carries a signature. Which sites took part is public. Masks are as good as AES, X25519 and
HKDF-SHA256. The sum itself is protected by noise, elsewhere.
"""

from fedllm.secagg.aggregator import (
    MaskedInputRequests,
    MaskedSum,
    check_key_shares,
    check_unmasking_shares,
    consistency_check,
    masked_input_request,
    unmask,
    unmasking_request,
)
from fedllm.secagg.participant import Participant
from fedllm.secagg.session import (
    Cohort,
    SessionParams,
    Vector,
    check_advertised_key,
    check_consistency_signature,
    check_survivor_list,
    common_digest,
    make_cohort,
)

__all__ = [
    "Cohort",
    "MaskedInputRequests",
    "MaskedSum",
    "Participant",
    "SessionParams",
    "Vector",
    "check_advertised_key",
    "check_consistency_signature",
    "check_key_shares",
    "check_survivor_list",
    "check_unmasking_shares",
    "common_digest",
    "consistency_check",
    "make_cohort",
    "masked_input_request",
    "unmask",
    "unmasking_request",
]
