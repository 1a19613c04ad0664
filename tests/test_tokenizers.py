"""Tokenizers of checkpoints: SentencePiece's tokenizer.model, with and without Hugging Face's files beside it."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
import sentencepiece
from words import word_tokenizer

import convert
import jaxmech as jm
from jaxmech import checkpoint as checkpoint_files
from jaxmech.model import abstract_params

SENTENCES = [example.sentence for example in jm.boxes.make(50, 7, seed=3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with a tokenizer.model like Llama 2's (BPE, byte fallback), trained on scenes with boxes."""
    path = tmp_path_factory.mktemp("sentencepiece")
    config = jm.Config(400, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8)
    convert.write_hf(path, config, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(config)))
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(path / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    return path


@pytest.mark.parametrize("beside", [{}, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}])
def test_a_sentencepiece_model_gives_the_tokens_of_sentencepiece(checkpoint, tmp_path, beside):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    if beside:
        (path / "tokenizer_config.json").write_text(json.dumps(beside))
    exact = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    tokenizer = jm.load(path).tokenizer
    for sentence in SENTENCES[:20]:
        assert tokenizer(sentence).input_ids == [exact.bos_id(), *exact.Encode(sentence)]


def test_a_sentencepiece_model_is_kept_by_a_conversion(checkpoint, tmp_path):
    model = jm.load(checkpoint)
    checkpoint_files.save(tmp_path / "orbax", model.config, model.params, model.tokenizer)
    assert jm.load(tmp_path / "orbax").tokenizer(SENTENCES[0]) == model.tokenizer(SENTENCES[0])


def test_the_tokenizer_json_is_preferred_to_a_sentencepiece_model(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    word_tokenizer().save_pretrained(path)
    assert jm.load(path).tokenizer("w3 w1").input_ids == [3, 1]


@pytest.mark.parametrize(
    "content, words", [(b"IQ== 0\nIg== 1\n", "tokenizer.json"), (b"", "copy it again")], ids=["tiktoken", "empty"]
)
def test_any_other_tokenizer_model_is_refused_with_advice(checkpoint, tmp_path, content, words):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=f"the tokenizer cannot be read.*{words}"):
        convert.read_tokenizer(tmp_path, jm.load(checkpoint).config)


def test_a_sentencepiece_model_that_is_not_like_llamas_is_refused(checkpoint, tmp_path):
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="read as Llama's, it turns .* tokenizer.json and tokenizer_config.json"):
        convert.read_tokenizer(tmp_path, jm.load(checkpoint).config)


def test_added_tokens_that_the_model_does_not_have_are_warned_of(checkpoint, tmp_path):
    path, tokenizer = shutil.copytree(checkpoint, tmp_path / "model"), word_tokenizer(400)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(path)
    with pytest.warns(UserWarning, match="added tokens <pad> are beyond the model's vocabulary of 400") as found:
        model = jm.load(path)
    assert found[0].filename == __file__ and model.tokenizer("w3 w1").input_ids == [3, 1]


@pytest.mark.filterwarnings("error")
def test_another_tokenizer_may_be_given_and_the_checkpoints_own_is_not_read(checkpoint, tmp_path):
    path, own = shutil.copytree(checkpoint, tmp_path / "model"), word_tokenizer()
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        jm.load(path)
    assert jm.load(path, tokenizer=own).tokenizer is own
    own.save_pretrained(tmp_path / "own")
    for folder in (tmp_path / "own", str(tmp_path / "own")):
        assert jm.load(path, tokenizer=folder).tokenizer("w3 w1").input_ids == own("w3 w1").input_ids
    with pytest.raises(ValueError, match="tokenizer='.*none' is no directory with a tokenizer"):
        jm.load(path, tokenizer=tmp_path / "none")
    checkpoint_files.save(tmp_path / "orbax", (model := jm.load(checkpoint)).config, model.params, model.tokenizer)
    assert jm.load(tmp_path / "orbax", tokenizer=own).tokenizer is own
