"""What others can use of a run: one file per format, in a folder that appears whole."""

from tfusion.exporting import llama, orbax

# each: check(cfg, where); write(export, folder) -> lines on what was written
FORMATS = {"orbax": orbax, "llama": llama}
