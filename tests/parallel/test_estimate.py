"""Estimates against what they estimate: counted parameters, bytes that simulated ranks sent, memory of a step here."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    ModernBertConfig,
    OPTConfig,
    PhiConfig,
    T5Config,
)
from typer.testing import CliRunner

from hf_tfast import Dense, Hashed, Nystrom, Performer, TFastConfig, Window
from hf_tfast.cli._app import app
from hf_tfast.parallel.estimate import Run, Shares, estimate
from hf_tfast.parallel.estimate_hardware import HARDWARE
from hf_tfast.parallel.estimate_model import Sizes, halo, sent_per_layer
from hf_tfast.parallel.sequence_measure import GROUPS, HEADS, WIDTH, measure

LARGE = Sizes(layers=32, hidden=4096, heads=32, groups=8, width=128, inner=14336, vocabulary=128256, tied=False)
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 352,
}


@pytest.mark.parametrize("config", [TFastConfig(**SMALL, causal=True), LlamaConfig(**SMALL, num_key_value_heads=2)],
                         ids=["tfast", "llama"])  # fmt: skip
def test_parameters(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert Sizes.of(config).parameters == pytest.approx(model.num_parameters(), rel=0.01)


@pytest.mark.parametrize(
    ("mechanism", "causal"),
    [(Window(window=65, sinks=2), True), (Window(window=32), False), (Performer(features=16), True),
     (Performer(features=16), False), (Nystrom(landmarks=16), False)], ids=str,
)  # fmt: skip
def test_bytes_sent_are_those_measured(mechanism, causal):
    sizes = Sizes(layers=1, hidden=HEADS * WIDTH, heads=HEADS, groups=GROUPS, width=WIDTH, inner=1, vocabulary=1,
                  causal=causal)  # fmt: skip
    for ranks in (2, 4):
        sent = measure(mechanism, causal, ranks, 1024)["most"]
        assert sent_per_layer(sizes, mechanism, ranks, 4)[0] == pytest.approx(sent, rel=0.1), f"{ranks} ranks"


def test_a_million_tokens_on_a_thousand_gpus():
    run = Run(length=2**20, batch=64, gpus=1024, checkpointing=True)
    window, *_ = estimate(LARGE, Window(window=4096, sinks=4), run, HARDWARE["h100"])
    with pytest.raises(ValueError, match="divisors in common"):  # without an exchange 64 sequences are too few
        estimate(LARGE, Dense(), run, HARDWARE["h100"])
    more = Run(length=2**20, batch=1024, gpus=1024, checkpointing=True)
    dense, *_ = estimate(LARGE, Dense(), more, HARDWARE["h100"])
    assert window.fits
    assert str(window.shares) == "sequence 64 x shard 8 x replicas 2"  # and so says docs/scale.md
    assert [round(x, 1) for x in (window.memory / 1e9, window.step_s, window.network_s)] == [67.0, 12.8, 6.8]
    assert window.shares.tensor * window.shares.sequence * window.shares.pipeline * window.shares.data == 1024
    assert dense.shares.sequence == 1  # dense attention has no exchange
    assert dense.compute_s > 10 * 16 * window.compute_s
    assert window.cache < dense.cache / 200


def test_what_sharing_does():
    run = Run(length=2**17, batch=8, gpus=8, narrow=4)
    alone, shard, sequence = (estimate(LARGE, Window(window=1024), run, HARDWARE["h100"], shares)[0] for shares in
                              (Shares(replicas=8), Shares(shard=8), Shares(sequence=8)))  # fmt: skip
    assert shard.optimiser == alone.optimiser / 8
    assert sequence.activations == pytest.approx(alone.activations / 8, rel=0.1)  # beside it halos and one gradient
    assert not alone.fits
    again = replace(run, checkpointing=True)
    saved = estimate(LARGE, Window(window=1024), again, HARDWARE["h100"],
                     Shares(replicas=8))[0]  # fmt: skip
    assert saved.activations < alone.activations / 2
    assert saved.compute_s > alone.compute_s


OTHERS = {  # config: causal, rotary, gated
    "bert": (BertConfig(**SMALL), False, False, False),
    "gpt2": (GPT2Config(vocab_size=512, n_embd=128, n_layer=4, n_head=4), True, False, False),
    "gpt_neox": (GPTNeoXConfig(**SMALL), True, True, False),
    "modernbert": (ModernBertConfig(**SMALL, pad_token_id=0), False, True, True),
    "opt": (OPTConfig(vocab_size=512, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, ffn_dim=352,
                      word_embed_proj_dim=128, max_position_embeddings=16), True, False, False),
    "phi": (PhiConfig(**SMALL), True, True, False),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_others(name):
    config, *expected = OTHERS[name]
    sizes = Sizes.of(config)
    assert [sizes.causal, sizes.rotary, sizes.gated] == expected
    auto = AutoModelForCausalLM if sizes.causal else AutoModelForMaskedLM
    with torch.device("meta"):
        model = auto.from_config(config)
    left_out = ("position", "wpe", "token_type")
    counted = {path: p.numel() for path, p in model.named_parameters() if p.ndim > 1}
    matrices = sum(size for path, size in counted.items() if not any(part in path for part in left_out))
    dense = 0 if sizes.causal else 128 * 128  # of the head that tells masked words
    assert sizes.parameters == matrices - dense


def test_what_a_config_does_not_tell():
    with pytest.raises(ValueError, match="MixtralConfig has experts"):
        Sizes.of(MixtralConfig())
    with pytest.raises(ValueError, match="FalconConfig does not tell"):
        Sizes.of(FalconConfig())
    with pytest.raises(ValueError, match="encoder and a decoder"):
        Sizes.of(T5Config())


def test_shares_that_do_not_divide():
    for match, batch, shares in (("takes 2 GPUs, and there are 4", 6, Shares(tensor=2)),
                                 ("6 sequences cannot", 6, Shares(replicas=4)),
                                 ("raise the batch to 4", 2, Shares(pipeline=4))):  # fmt: skip
        run = Run(length=4096, batch=batch, gpus=4)
        with pytest.raises(ValueError, match=match):
            estimate(LARGE, Window(window=16), run, HARDWARE["h100"], shares)


def test_halo():
    mechanism = Window(window=64, sinks=4)
    assert halo(LARGE, mechanism) == 63 + 4
    assert halo(replace(LARGE, causal=False), mechanism) == 2 * 64 + 4
    assert halo(LARGE, Performer(features=16)) == 0


def test_bound():
    one = estimate(LARGE, Window(window=64), Run(length=4096, batch=1, gpus=1), HARDWARE["h100"])[0]
    found = [replace(one, compute_s=c, bandwidth_s=b, network_s=n).bound for c, b, n in
             ((2, 2, 3), (2, 3, 4), (2, 2, 5))]  # fmt: skip
    assert found == ["compute", "bandwidth", "network"]


def test_gradients_that_are_scattered_late():
    """With several rows a GPU and no replicas FSDP2's gradients are whole until the last."""
    small = Sizes(layers=3, hidden=64, heads=4, groups=4, width=16, inner=128, vocabulary=1000)

    def of(rows, **shares):
        run = Run(length=256, batch=4 * rows, gpus=4, narrow=4)
        return estimate(small, Window(window=16), run, HARDWARE["h100"], Shares(**shares))[0]

    assert of(2, shard=4).gradients == 4 * small.parameters
    assert of(1, shard=4).gradients == small.parameters
    assert of(2, shard=2, replicas=2).gradients == 4 * small.parameters / 2
    words = 1000 * 64
    layers = 2 * small.parameters - words
    assert of(3, shard=4).sent == 4 * (3 * layers + small.parameters) * 3 / 4
    summed = 2 * 4 * small.parameters / 2 / 2  # of the replicas, once
    assert of(3, shard=2, replicas=2).sent == 4 * 3 * (layers + small.parameters) / 2 + summed


def test_gradients_of_earlier_rows_in_a_pipeline():
    """The first stage has none while its first rows are under way, the last one has them from its second row."""
    words = Sizes(layers=2, hidden=64, heads=4, groups=4, width=16, inner=128, vocabulary=50_000)
    run = Run(length=256, batch=2, gpus=2, narrow=4)
    last = estimate(words, Window(window=16), run, HARDWARE["h100"], Shares(pipeline=2))[0]
    assert last.beside
    layers = replace(words, layers=8, vocabulary=100)
    assert not estimate(layers, Window(window=16), run, HARDWARE["h100"], Shares(pipeline=2))[0].beside


def test_buckets_of_a_shared_sequence():
    small = Sizes(layers=3, hidden=64, heads=4, groups=4, width=16, inner=128, vocabulary=1000)
    for sizes, expected in ((small, small.parameters), (LARGE, LARGE.vocabulary * LARGE.hidden)):
        run = Run(length=256, batch=1, gpus=2)
        e = estimate(sizes, Window(window=16), run, HARDWARE["h100"], Shares(sequence=2))[0]
        assert e.buckets == 2 * 4 * expected
        assert e.memory >= e.weights + e.optimiser + e.gradients + e.buckets


def test_what_is_sent_once_more():
    """A layer that is computed again exchanges again; torch leaves out its last sum."""
    run = Run(length=4096, batch=8, gpus=4, narrow=4)
    small = Sizes(layers=3, hidden=64, heads=4, groups=4, width=16, inner=128, vocabulary=1000)

    def more(**shares):
        both = [estimate(small, Window(window=64), replace(run, checkpointing=again), HARDWARE["h100"],
                         Shares(**shares))[0].sent for again in (False, True)]  # fmt: skip
        return both[1] - both[0]

    assert more(tensor=4) == pytest.approx(3 * 8 * 4096 * 64 * 4 * 2 * 3 / 4)
    assert more(sequence=4) == pytest.approx(8 * 3 * 63 * 2 * 64 * 4)
    assert more(shard=4) == more(pipeline=4) == 0


def test_bad_input():
    with pytest.raises(ValueError, match="divisors in common"):
        estimate(LARGE, Dense(), Run(length=1021, batch=1, gpus=7), HARDWARE["h100"])
    with pytest.raises(ValueError, match="no formula for hashed"):
        estimate(LARGE, Hashed(), Run(length=1024, batch=1, gpus=1), HARDWARE["h100"])
    with pytest.raises(ValueError, match="at least 1"):
        Run(length=0, batch=1, gpus=1)
    with pytest.raises(ValueError, match="2 bytes .* or 4"):
        Run(length=8, batch=1, gpus=1, narrow=8)


def test_what_is_sent():
    """By the definition of the collective operations: rings send all but a share of what they sum, twice."""
    given = Run(length=4096, batch=8, gpus=4, narrow=4), HARDWARE["h100"]
    small = Sizes(layers=3, hidden=64, heads=4, groups=4, width=16, inner=128, vocabulary=1000)

    def sent(mechanism=Window(window=64), **shares):  # noqa: B008 frozen
        return estimate(small, mechanism, *given, Shares(**shares))[0].sent

    gradients = 2 * 4 * small.parameters * 3 / 4
    assert sent(replicas=4) == gradients
    words = 1000 * 64  # tied embeddings are gathered once a row, layers twice; gradients leave after both rows
    assert sent(shard=4) == 4 * (2 * (2 * small.parameters - words) + small.parameters) * 3 / 4
    gloo = replace(HARDWARE["h100"], reduces_whole=True)
    whole = estimate(small, Window(window=64), given[0], gloo, Shares(shard=4))[0].sent
    assert whole - sent(shard=4) == 4 * small.parameters * 3 / 4
    states = 8 * 4096 * 64 * 4 * 2 * 3 / 4
    assert sent(tensor=4) == 23 * states + 8 * 4096 * 1000 * 4 * 3 / 4
    halo = 2 * 63 * 2 * 64 * 4  # keys and values forward, their gradients backward
    assert sent(sequence=4) == gradients + 8 * 3 * halo
    half = Run(length=4096, batch=8, gpus=4), HARDWARE["h100"]
    narrow = estimate(small, Window(window=64), *half, Shares(tensor=4))[0]
    assert narrow.sent == sent(tensor=4) / 2
    assert narrow.activations < estimate(small, Window(window=64), *given, Shares(tensor=4))[0].activations


def test_command():
    given = ["estimate", "--model", json.dumps({**SMALL, "causal": True}), "--length", "4096", "--gpus", "4", "--json",
             "--mechanism", "window:window=128"]  # fmt: skip
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["mechanism"]["window"] == 128
    assert found["layouts"][0]["fits"]


def test_what_every_layout_keeps_beside_its_share():
    run = Run(length=256, batch=8, gpus=4, narrow=4)
    small = Sizes(layers=6, hidden=64, heads=4, groups=4, width=16, inner=128, vocabulary=1000)

    def of(**shares):
        return estimate(small, Window(window=16), run, HARDWARE["h100"], Shares(**shares))[0]

    words = 4 * 1000 * 64
    assert of(replicas=4).copies == 4 * small.parameters  # the buckets of DistributedDataParallel
    assert of(shard=4).copies == words + 2 * 4 * small.layer
    assert of(tensor=4).copies == of(sequence=4).copies == of(pipeline=4).copies == 0
    assert of(pipeline=4).weights == words + 2 * 4 * small.layer  # 6 layers in 4 stages: two in the first
    # eight rows one after the other find gradients of those before; where every GPU has one row, they come later
    assert of(tensor=4).beside
    assert not estimate(small, Window(window=16), replace(run, batch=4), HARDWARE["h100"], Shares(replicas=4))[
        0
    ].beside


def test_what_is_cut_takes_less_time():
    """Products are cut by tensor parallelism, norms and residuals are not."""
    run = Run(length=256, batch=8, gpus=4, narrow=4)
    small = Sizes(layers=8, hidden=64, heads=4, groups=4, width=16, inner=128, vocabulary=100)
    tensor, data = (estimate(small, Window(window=16), run, HARDWARE["h100"], shares)[0] for shares in
                    (Shares(tensor=4), Shares(replicas=4)))  # fmt: skip
    assert tensor.compute_s == pytest.approx(data.compute_s)
    assert 1.5 * data.bandwidth_s < tensor.bandwidth_s < 4 * data.bandwidth_s
    piped = estimate(small, Window(window=16), run, HARDWARE["h100"], Shares(pipeline=4))[0]
    busiest = 2 * small.layer + 100 * 64  # the last of four stages has the output layer, too
    assert piped.compute_s / data.compute_s > 11 / 8 * 4 * busiest / small.multiplied * 0.9
    slow = replace(HARDWARE["h100"], fused_norm=False)
    chain = estimate(small, Window(window=16), run, slow, Shares(replicas=4))[0]
    assert chain.bandwidth_s > 1.3 * data.bandwidth_s
