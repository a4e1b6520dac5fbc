"""Train storybook-clip: pictures and captions that belong together get similar embeddings.

Radford et al., 2021. The text half then conditions the pipelines, as in Stable Diffusion. Each picture
must also tell its caption from two near misses of it, with places or colours exchanged (NegCLIP,
Yuksekgonul et al., 2022), and the text's end token must name what the caption says: the first loss
alone hardly ever asks where things stand, and whatever the text half drops the denoisers never hear.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, PreTrainedModel

from storybook import world
from storybook.train import data
from storybook.world import COLOURS, KINDS, POSITIONS, RELATIONS, SETTINGS, Scene
from training.loop import Schedule, keep_log, train

MAX_TOKENS = 32  # the longest caption takes 23; SD1.5 has 77
OUT = Path("models/storybook-clip")


def new_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, with merges learned from the world's words: each is one token.

    Any other word still has tokens, down to single bytes.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=1, show_progress=False
    )
    bpe.train_from_iterator(sorted(world.words()), trainer)
    learned = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    tokens = dict.fromkeys([*learned, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"])
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer({token: index for index, token in enumerate(tokens)}, merges, model_max_length=MAX_TOKENS)


def new_clip(tokenizer: CLIPTokenizer, size: int, width: int = 128) -> CLIPModel:
    """A small CLIPModel for pictures of `size` pixels, 64 patches each."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 4,
        "projection_dim": width,
    }
    text = {
        **shared,
        **ids,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
    }
    vision = {**shared, "num_hidden_layers": 3, "image_size": size, "patch_size": size // 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (B, model_max_length), padded and cut as the pipelines do it."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def misplaced(scene: Scene, rng: random.Random) -> Scene:
    """The scene with its things at other places, where places are said; else `recoloured`."""
    if scene.relation:
        return replace(scene, relation=rng.choice([r for r in RELATIONS if r != scene.relation]))
    first = scene.things[0]
    if first.position:
        moved = replace(first, position=rng.choice([p for p in POSITIONS if p != first.position]))
        return replace(scene, things=(moved,))
    return recoloured(scene, rng)


def recoloured(scene: Scene, rng: random.Random) -> Scene:
    """The scene with the colours of its two things exchanged, or with another colour or kind on one thing."""
    things = scene.things
    if len(things) == 2 and things[0].colour != things[1].colour:
        swapped = (replace(things[0], colour=things[1].colour), replace(things[1], colour=things[0].colour))
        return replace(scene, things=swapped)
    which = rng.randrange(len(things))
    thing = things[which]
    if thing.colour and rng.random() < 0.5:
        thing = replace(thing, colour=rng.choice([colour for colour in COLOURS if colour != thing.colour]))
    else:
        thing = replace(thing, kind=rng.choice([kind for kind in KINDS if kind != thing.kind]))
    return replace(scene, things=(*things[:which], thing, *things[which + 1 :]))


ANSWERS = {"kind": tuple(KINDS), "colour": tuple(COLOURS), "setting": SETTINGS, "position": POSITIONS}
ANSWERS |= {"relation": RELATIONS, "second kind": ANSWERS["kind"], "second colour": ANSWERS["colour"]}


def said(scene: Scene) -> list[int]:
    """For each of `ANSWERS` the number of what the scene says, -100 (ignored by the loss) where it says nothing."""
    first, second = (*scene.things, None)[:2]
    told = (first.kind, first.colour, scene.setting, first.position, scene.relation)
    told += (second.kind, second.colour) if second else (None, None)
    return [options.index(what) if what else -100 for options, what in zip(ANSWERS.values(), told, strict=True)]


class ClipObjective(nn.Module):
    """Each picture must find its caption, near misses among them, each caption its picture, and say its content."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        width = clip.config.text_config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, len(options)) for options in ANSWERS.values())

    def forward(self, images, token_ids, answers):
        """images (B, 3, H, W) in [-1, 1]; token_ids (B, 3, T): caption, misplaced, recoloured; answers (B, 7)."""
        out = self.clip(input_ids=token_ids.transpose(0, 1).flatten(0, 1), pixel_values=images)
        logits = out.logits_per_image.float()  # (B, 3 B)
        count = len(images)
        own = torch.arange(count, device=logits.device)
        # of the near misses each picture meets only its own two: those of others are easy
        near = torch.stack([logits[own, own + count], logits[own, own + 2 * count]], 1)
        to_texts, to_images = torch.cat([logits[:, :count], near], 1), logits[:, :count].T
        matching = (nn.functional.cross_entropy(to_texts, own) + nn.functional.cross_entropy(to_images, own)) / 2
        end_states = out.text_model_output.pooler_output[:count]
        naming = sum(
            nn.functional.cross_entropy(head(end_states).float(), answers[:, i], reduction="sum")
            for i, head in enumerate(self.heads)
        )  # a mean would be 0 / 0 where no caption of the batch says such a thing
        told = (logits[own, own][:, None] > near).all(1).float().mean()
        return {
            "loss": matching + naming / count,
            "matched": (to_images.argmax(1) == own).float().mean(),
            "told_from_misses": told,
            "naming": naming / count,
        }


def main(argv=None) -> None:
    """Train and write a CLIPModel folder, models/storybook-clip unless told otherwise."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--name", default="clip")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=550)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    clip = new_clip(tokenizer, args.size, args.width)
    images = data.pictures("train", args.pictures, args.size)
    scenes = data.scenes("train", args.pictures)

    def make_batch(indices, generator):
        seed = int(torch.randint(2**31, (), generator=generator))
        shown, rng = [scenes[i] for i in indices], random.Random(seed)
        # the same seed: a near miss has the wording of its caption
        texts = data.captions(shown, seed) + data.captions([misplaced(scene, rng) for scene in shown], seed)
        texts += data.captions([recoloured(scene, rng) for scene in shown], seed)
        answers = torch.tensor([said(scene) for scene in shown])
        token_ids = tokenize(tokenizer, texts).unflatten(0, (3, -1)).transpose(0, 1)
        return data.to_tensor(images[indices.numpy()]), token_ids, answers

    schedule = Schedule(args.steps, args.batch_size, 1e-3, weight_decay=0.05)
    run = train(args.name, ClipObjective(clip), clip, make_batch, args.pictures, schedule)
    save_half(clip, args.out)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # [0, 1] to [-1, 1], as the VAE takes it
    CLIPImageProcessorPil(size={"shortest_edge": args.size}, crop_size=args.size, **half).save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)
    keep_log(run, args.out)


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Save in half precision, but have the weights loaded as float32, as diffusers loads its own.

    transformers takes the dtype from config.json; left at float16, the stock pipeline would come up
    with a float16 text encoder beside a float32 UNet.
    """
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write tokenizer.json and also the vocab.json and merges.txt that SD1.5's folders carry."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


if __name__ == "__main__":
    main()
