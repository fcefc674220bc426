"""detectron2 and mmsegmentation: what export and training share. Nothing of them is imported before it is used."""
