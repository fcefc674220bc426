"""YAML recipes, found by name: `mls pretrain mls_scenes_tiny`."""
