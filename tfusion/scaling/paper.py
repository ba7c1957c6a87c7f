"""What the Transfusion paper (arXiv 2408.11039) prints in its tables of the comparison: data, not results.

Perplexities (`c4`, `wikipedia`) and `fid`: lower is better; `accuracy` (%, Llama 2's suite), `cider` (x 100)
and `clip`: higher. Guidance is 5 in table 3 and 3 in the others, so FID and CLIP are not to be compared across.
"""

from typing import NamedTuple

TOKENS = 0.5e12  # of every run of tables 3 to 7
# Of the shared transformer with untied embeddings of 32,000 tokens, by the sizes of table 2: computed.
PARAMS = {"0.16B": 162.4e6, "0.37B": 373.9e6, "0.76B": 777.9e6, "1.4B": 1364.3e6, "7B": 6738.4e6}
BETTER = {"c4": "lower", "wikipedia": "lower", "accuracy": "higher", "cider": "higher", "fid": "lower",
          "clip": "higher"}
TITLES = {"c4": "C4 perplexity", "wikipedia": "Wikipedia perplexity", "accuracy": "Llama accuracy (%)",
          "cider": "CIDEr", "fid": "FID", "clip": "CLIP score"}
# Points that the paper leaves out of its fits: small models that have not begun to see or draw.
OUTLIERS = {"fid": lambda value: value > 100, "clip": lambda value: value < 17,
            "cider": lambda value: value < 4}


class Scores(NamedTuple):
    """Of one run; None where the table has no such column."""

    c4: float
    wikipedia: float
    accuracy: float
    cider: float | None = None
    fid: float | None = None
    clip: float | None = None


# Table 3: both recipes at 7B, and the share of the FLOPs with which Transfusion matches the other.
TRANSFUSION_7B = Scores(7.72, 4.28, 61.5, 27.2, 16.8, 25.5)
CHAMELEON_7B = Scores(8.41, 4.69, 59.1, 18.0, 29.6, 24.3)
PARITY = Scores(0.489, 0.526, 0.600, 0.218, 0.029, 0.319)

# Table 4, at 0.76B: from the Llama 2 recipe in one step to Transfusion, in two to Chameleon.
STEPS = {
    "Llama 2 recipe": Scores(10.1, 5.8, 53.7),
    "Transfusion: + diffusion": Scores(10.4, 6.0, 51.7),
    "Chameleon: + stability changes": Scores(11.0, 6.3, 51.9),
    "Chameleon: + LM loss on image tokens": Scores(11.8, 6.8, 48.9)}

# Tables 5, 6 and 7, the rows of the linear adapter (6: of no adapter where a patch is one latent pixel).
ATTENTION = {
    "causal": Scores(10.4, 6.0, 51.4, 12.7, 61.3, 23.0),
    "bidirectional": Scores(10.4, 6.0, 51.7, 16.0, 20.3, 24.0)}
PATCHES = {  # latent pixels along a patch's side
    "1": Scores(10.3, 5.9, 52.2, 12.0, 21.0, 24.0),
    "2": Scores(10.4, 6.0, 51.7, 16.0, 20.3, 24.0),
    "4": Scores(10.9, 6.3, 49.8, 14.3, 25.6, 22.6),
    "8": Scores(11.7, 6.9, 47.7, 11.3, 43.5, 18.9)}
SIZES = {
    "0.16B": Scores(14.8, 8.8, 44.2, 6.2, 37.6, 20.0),
    "0.37B": Scores(12.0, 7.0, 47.9, 11.1, 21.5, 22.4),
    "0.76B": Scores(10.4, 6.0, 51.7, 16.0, 20.3, 24.0),
    "1.4B": Scores(9.5, 5.4, 53.8, 19.1, 19.4, 24.3),
    "7B": Scores(7.7, 4.3, 61.5, 27.2, 18.6, 25.9)}

TABLES = {  # {number: (what is varied, its rows)}
    "4": ("From the Llama 2 recipe to both, at 0.76B", STEPS),
    "5": ("Attention inside an image, at 0.76B", ATTENTION),
    "6": ("Latent pixels along a patch's side, at 0.76B", PATCHES),
    "7": ("Size", SIZES)}
