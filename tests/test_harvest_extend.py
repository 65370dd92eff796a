"""A complete cache is continued with more of its text; readers see the old rows until the new ones are all there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_kit import contents
from harvest_kit import CutOff, build_model, config_of, cut_off_after, packed, row_errors
from test_harvest_resume import assert_same_cache, write_corpus

from sae_granary import open_cache
from sae_granary.cache.errors import CacheError
from sae_granary.cache.format.layout import COLUMNS
from sae_granary.cache.read.verify import verify
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.run import harvest_activations


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: str(build_model(folder / name, name)) for name in ("bert", "llama")}


@pytest.fixture
def config(models: dict[str, str], tmp_path: Path) -> HarvestConfig:
    """Sort buffers of 512 rows, shards of 256."""
    sizes = {"ctx_len": 16, "batch_tokens": 32, "max_tokens": 700, "rows_per_shard": 256}
    return config_of(models["bert"], write_corpus(tmp_path / "corpus.txt"), tmp_path / "cache", **sizes)


def harvest(config: HarvestConfig, **changes: object) -> object:
    return harvest_activations(replace(config, **changes), quiet=True)


@pytest.mark.parametrize("pack", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_extended_cache_has_the_rows_of_one_longer_harvest(
    config: HarvestConfig, models: dict[str, str], pack: bool
) -> None:
    config = packed(config, models["llama"]) if pack else config
    harvest(config)
    before = contents(config.out_path)
    harvest(config, extend=True, max_tokens=1300)
    result = harvest(config, extend=True, max_tokens=2400)
    after = contents(config.out_path)
    assert [name for name in before if before[name] != after[name] and "json" not in Path(name).name] == []
    longer = config.out_path.with_name("longer")
    harvest(config, out=longer, max_tokens=2400)
    found, want = open_cache(config.out_path), open_cache(longer)
    ids = want.document_ids()
    assert found.document_ids() == ids
    assert [found.find_document(i) for i in ids] == [want.find_document(i) for i in ids]
    assert found.manifest.fingerprint == want.manifest.fingerprint
    assert len(found.manifest.extended) == 2
    assert verify(config.out_path).ok
    assert verify(config.out_path).foreign == ()
    if not pack:  # windows are the same: a packed one ends where a harvest ends
        assert result.n_rows == found.n_rows == want.n_rows
        assert found.manifest.summary == want.manifest.summary
        for name in COLUMNS:
            np.testing.assert_array_equal(found.column(name)[:], want.column(name)[:])
        assert row_errors(found.hook()[:], want.hook()[:]).max() < 1e-5
    text = [c.column("token_id")[:][c.column("doc_position")[:] >= 0].tolist() for c in (found, want)]
    assert text[0][: len(text[1])] == text[1][: len(text[0])]


@pytest.mark.slow
def test_a_killed_extension_continues_to_the_same_bytes_and_the_cache_always_opens(config: HarvestConfig) -> None:
    harvest(config)
    n_rows, n_shards = (c := open_cache(config.out_path)).n_rows, len(c.shards)
    cut = config.out_path.with_name("cut")
    harvest(config, out=cut)
    harvest(config, extend=True, max_tokens=2400)
    seen = []
    for n_batches in range(3, 400, 19):
        try:
            with cut_off_after(n_batches):
                harvest(config, out=cut, extend=True, max_tokens=2400)
            break
        except CutOff:
            assert (open_cache(cut).n_rows, len(open_cache(cut).shards)) == (n_rows, n_shards)
            growing = open_cache(cut, allow_incomplete=True)
            seen.append(len(growing.shards))
            assert verify(cut).ok
            assert growing.complete == (len(growing.shards) == n_shards)
            assert growing.stats().n_rows == growing.n_rows
            assert harvest(config, out=cut).already_complete  # the shorter harvest is there
    assert seen[-1] > n_shards
    assert len(seen) > 3
    assert_same_cache(cut, config.out_path)


@pytest.mark.slow
def test_a_text_file_that_was_appended_to_is_extended(config: HarvestConfig) -> None:
    corpus = Path(config.text.dataset)
    whole = corpus.read_text() + "\n"
    corpus.write_text("\n".join(whole.split("\n")[:60]) + "\n")
    harvest(config, max_tokens=None)
    assert harvest(config, max_tokens=None, extend=True).already_complete  # there is no more of it
    corpus.write_text(whole)
    with pytest.raises(CacheError, match="dataset_full_xxh3"):
        harvest(config, max_tokens=None)
    harvest(config, max_tokens=None, extend=True)
    assert harvest(config, max_tokens=None).already_complete
    longer = config.out_path.with_name("longer")
    harvest(config, max_tokens=None, out=longer)
    found, want = open_cache(config.out_path), open_cache(longer)
    assert found.manifest.summary == want.manifest.summary
    np.testing.assert_array_equal(found.column("token_id")[:], want.column("token_id")[:])


@pytest.mark.slow
def test_a_text_that_changed_before_the_end_is_not_extended(config: HarvestConfig) -> None:
    harvest(config)
    corpus, before = Path(config.text.dataset), contents(config.out_path)
    lines = corpus.read_text().split("\n")
    corpus.write_text("\n".join([*lines[:3], lines[3] + " more", *lines[4:]]))
    with pytest.raises(HarvestError, match=r"record 3: this is not the text whose rows are committed"):
        harvest(config, extend=True, max_tokens=2400)
    assert contents(config.out_path) == before
    with pytest.raises(CacheError, match="dataset_full_xxh3"):
        harvest(config)


def test_what_is_asked_of_a_complete_cache(config: HarvestConfig) -> None:
    first = harvest(config)
    before = contents(config.out_path)
    with pytest.raises(ConfigError, match=r"complete harvest of \d+ rows: add --extend to continue it up to 2,400"):
        harvest(config, max_tokens=2400)
    with pytest.raises(CacheError, match="ctx_len"):
        harvest(config, max_tokens=2400, extend=True, tokens=replace(config.tokens, ctx_len=12))
    assert harvest(config, extend=True).already_complete
    assert harvest(config, extend=True, max_tokens=100).n_rows == first.n_rows
    assert contents(config.out_path) == before


@pytest.mark.slow
def test_extend_continues_an_unfinished_cache_and_starts_a_new_one(config: HarvestConfig) -> None:
    whole = config.out_path.with_name("whole")
    harvest(config, out=whole)
    with pytest.raises(CutOff), cut_off_after(20):
        harvest(config, extend=True)
    harvest(config, extend=True)
    assert_same_cache(config.out_path, whole)


@pytest.mark.slow
def test_a_smaller_limit_ends_after_the_document_of_the_last_committed_row(config: HarvestConfig) -> None:
    with pytest.raises(CutOff), cut_off_after(60):
        harvest(config, max_tokens=2400)
    n_rows = open_cache(config.out_path, allow_incomplete=True).n_rows
    assert n_rows > 300
    result = harvest(config, max_tokens=300)
    assert result.n_rows == open_cache(config.out_path).manifest.summary["n_rows"] >= n_rows
    harvest(config, max_tokens=2400, extend=True)
    longer = config.out_path.with_name("longer")
    harvest(config, max_tokens=2400, out=longer)
    np.testing.assert_array_equal(
        open_cache(config.out_path).column("doc_id")[:], open_cache(longer).column("doc_id")[:]
    )
