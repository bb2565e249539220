"""Which probe sets engines can load and policies name, and that none is deleted while something names it."""

from __future__ import annotations

import re

import pytest
from sedac.contract.v1 import probe_sets_pb2
from sedac.errors import (
    PolicyInvalid,
    ProbeSetExists,
    ProbeSetInUse,
)
from sedac.policy.model import Checkpoint, Policy

from testing.control.uploads import BARE, list_files, upload
from testing.probe_sets import make_set
from testing.strategies import certify

CHECKPOINTS = (Checkpoint(layer=2, threshold=0.5), Checkpoint(layer=5, threshold=0.25))
NAMED = Policy(enabled=True, probe_set="fresh", checkpoints=CHECKPOINTS)


def test_who_can_load_a_set_is_told_engine_by_engine(client, stub, make_engine):
    make_engine("small", max_rank=4).pushes.get(timeout=10)
    make_engine("tiny", max_rank=2).pushes.get(timeout=10)
    answer = upload(stub, BARE.make_parts())
    assert answer.state == probe_sets_pb2.PROBE_SET_STATE_LOADABLE
    fits = {fit.engine_id: fit.problem for fit in answer.engines}
    assert fits["small"] == ""
    assert re.search("its rank 4 is over 2, .*; restart", fits["tiny"])
    answer = upload(stub, make_set("wide", rank=8, levels=False).make_parts())
    assert answer.state == probe_sets_pb2.PROBE_SET_STATE_VERIFIED
    with pytest.raises(PolicyInvalid, match=r"probe_set: 'wide' can't be loaded: its rank 8 is over"):
        client.update_policy(Policy(probe_set="wide", checkpoints=CHECKPOINTS))
    assert client.get_policy().revision == 1


def test_a_policy_names_an_uploaded_set_and_the_engine_is_sent_where_to_fetch_it(client, stub, make_engine):
    engine = make_engine()
    assert not engine.pushes.get(timeout=10).probe_sets
    with pytest.raises(PolicyInvalid, match=r"probe_set: 'fresh' is neither attached \('demo' is\) nor uploaded; upload it"):
        client.update_policy(NAMED)
    upload(stub, BARE.make_parts())
    made = client.update_policy(NAMED)
    push = engine.pushes.get(timeout=10)
    assert (push.policy.revision, push.policy.probe_set) == (made.revision, "fresh")
    assert [(r.name, r.sha256, r.size_bytes) for r in push.probe_sets] == [("fresh", BARE.sha256, len(BARE.weights))]
    client.wait_until_synced(made.revision, 10)
    assert set(client.get_probe_set("fresh").referenced_by) == {"policies/default", "engines/e1"}
    upload(stub, make_set("part", (5,), levels=False).make_parts())
    with pytest.raises(PolicyInvalid, match=r"checkpoints\[0\].layer: 2 has no probe in 'part' \(it has 5\)"):
        client.update_policy(Policy(probe_set="part", checkpoints=CHECKPOINTS))


def test_the_name_that_an_engine_started_with_is_not_given_to_another_set(client, stub, make_engine):
    make_engine().pushes.get(timeout=10)
    with pytest.raises(ProbeSetExists, match="engine e1 started with another set named 'demo'"):
        upload(stub, make_set("demo", levels=False).make_parts())
    assert client.update_policy(Policy(probe_set="demo", checkpoints=CHECKPOINTS)).revision == 2


def test_a_set_in_use_is_not_deleted_and_a_deleted_one_is_not_named(client, stub, make_engine, store):
    engine = make_engine()
    engine.pushes.get(timeout=10)
    upload(stub, BARE.make_parts())
    named = client.update_policy(NAMED)
    client.wait_until_synced(named.revision, 10)
    with pytest.raises(ProbeSetInUse, match=r"'fresh' is used by policies/default, engines/e1; name another set there first"):
        client.delete_probe_set("fresh")
    engine.answers = False  # the next revision stays unanswered, so the engine still runs the one before
    after = client.update_policy(Policy(enabled=True, checkpoints=CHECKPOINTS))
    push = engine.pushes.get(timeout=10)
    while push.policy.revision != after.revision:
        push = engine.pushes.get(timeout=10)
    with pytest.raises(ProbeSetInUse, match=r"'fresh' is used by engines/e1"):
        client.delete_probe_set("fresh")
    engine.answer(push)
    client.wait_until_synced(after.revision, 10)
    client.delete_probe_set("fresh")
    assert list_files(store) == set()
    with pytest.raises(PolicyInvalid, match=r"probe_set: 'fresh' was deleted; upload it again \(sha256 [0-9a-f]{12}\.\.\.\), or name another set"):
        client.rollback(named.revision)
    assert client.get_policy().revision == after.revision
    upload(stub, BARE.make_parts())
    assert client.rollback(named.revision).revision == after.revision + 1


def test_a_rollback_to_a_deleted_set_is_refused_without_engines_too(client, stub):
    upload(stub, BARE.make_parts())
    named = client.update_policy(NAMED)
    client.update_policy(Policy(checkpoints=CHECKPOINTS))
    client.delete_probe_set("fresh")
    with pytest.raises(PolicyInvalid, match="'fresh' was deleted; upload it again"):
        client.rollback(named.revision)


def test_certificates_are_held_against_the_set_that_is_named(client, stub, make_engine):
    upload(stub, BARE.make_parts())
    engine = make_engine()
    engine.pushes.get(timeout=10)
    with pytest.raises(PolicyInvalid, match=r"certificate.probe_set_sha256: 222222222222\.\.\., the engine has"):
        client.update_policy(certify(NAMED))
    assert client.update_policy(certify(NAMED, probe_set=BARE.sha256)).HasField("certificate")
    engine.close()
    make_engine("levelled", levels=("full", "width-20", "skip"), levels_sha256="5" * 64).pushes.get(timeout=10)
    client.update_policy(NAMED)
    with pytest.raises(PolicyInvalid, match=r"certificate.probe_set_sha256: .*'fresh' has no levels of its own"):
        client.update_policy(certify(NAMED, probe_set=BARE.sha256))
