"""Figures of self-speculation: ratios, differences and sums of totals that the engine's own counters make."""

from __future__ import annotations

import pytest

from testing.figures import make_controller, make_drafting


def test_ratios_are_those_of_the_words():
    drafting = make_drafting((0, 0), (3, 3), (3, 1), (2, 0))
    assert drafting.acceptance_rate == 4 / 8
    assert drafting.tokens_per_step == (1 + 4 + 2 + 1) / 4
    assert drafting.token_ratio == 4 / 8
    assert drafting.mean_length == 8 / 3
    assert drafting.draft_share == 0.25
    assert (drafting.drafted_at, drafting.accepted_at) == ((3, 3, 2), (2, 1, 1))
    assert sum(drafting.drafted_at) == drafting.num_drafted


def test_before_the_first_token_there_is_no_ratio():
    assert make_drafting().get_rates() == dict.fromkeys(("acceptance_rate", "token_ratio", "tokens_per_step", "mean_length", "draft_share"))
    plain = make_drafting((0, 0)).get_rates()
    assert (plain["acceptance_rate"], plain["mean_length"]) == (None, None)
    assert (plain["token_ratio"], plain["tokens_per_step"], plain["draft_share"]) == (0, 1, 0)


def test_what_came_since_is_the_difference_and_everything_after_a_restart():
    before, now = make_drafting((3, 1)), make_drafting((3, 1), (2, 2), (0, 0), controller=(make_controller(1),))
    new = now.since(before)
    assert (new.num_drafted, new.num_accepted, new.lengths, new.accepted_at) == (2, 2, (1, 0, 1, 0), (1, 1, 0))
    assert (new.num_verified_steps, new.num_passes, new.step_seconds, new.controller) == (1, 2, 0.5, now.controller)
    assert now.since(None) is now
    assert before.since(now) is before, "totals that shrink began anew"
    assert now.since(now).num_drafted == 0


def test_ranks_add_up_and_of_a_size_both_know_the_first_tells():
    one = make_drafting((3, 1), controller=(make_controller(1), make_controller(8, "paused", 0.9)))
    two = make_drafting((5, 4), (0, 0), max_tokens=5, controller=(make_controller(2), make_controller(1, "trying")))
    both = one.plus(two)
    assert (both.num_drafted, both.num_accepted, both.num_verified_steps) == (8, 5, 2)
    assert (both.lengths, both.accepted_at) == ((1, 0, 0, 1, 0, 1), (2, 1, 1, 1, 0))
    assert both.acceptance_rate == pytest.approx(5 / 8)
    assert [(c.num_sequences, c.state) for c in both.controller] == [(1, "drafting"), (2, "drafting"), (8, "paused")]
