"""Detection, instance segmentation and semantic segmentation on a pretrained backbone: `task: detection` and
`task: segmentation`. One protocol is run by run.py; what the protocols may say is in schema.py."""
