"""Synthetic images in plain ``.npy`` shards, described by a manifest that is written last."""

from proxyrob.shards.manifest import MANIFEST, ShardEntry, ShardManifest, read_manifest, read_shard, shard_name, write_manifest

__all__ = ["MANIFEST", "ShardEntry", "ShardManifest", "read_manifest", "read_shard", "shard_name", "write_manifest"]
