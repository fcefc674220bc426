"""detectron2 and mmsegmentation: what export and downstream training share. They are imported on first use."""
