"""Preparing: raw sources tokenised and encoded into the store that training reads, by one process or several.

shards.py      a fixed range of a source's records becomes a shard, the same bytes whoever writes it
unfinished.py  the folder beside data.prepared that is written, gone on with, and put in its place
card.py        what the data are, counted
"""
