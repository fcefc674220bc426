"""Probes on frozen features: kNN, linear classifiers with chosen settings, the support vector machine of the
literature. The monitor uses them during a run, eval/ after it. Features are extracted elsewhere."""

from mls.frozen.probe.labels import Labels, few_shot, held_out_split, read_labels, share_of
from mls.frozen.probe.linear import Candidate, Probe, ProbeOptions, fit_linear, linear_probe
from mls.frozen.probe.neighbours import Knn, knn, knn_scores, nearest
from mls.frozen.probe.sgd import Sgd, sgd_probe
from mls.frozen.probe.svm import Svm, svm_probe

__all__ = [
    "Candidate",
    "Knn",
    "Labels",
    "Probe",
    "ProbeOptions",
    "Sgd",
    "Svm",
    "few_shot",
    "fit_linear",
    "held_out_split",
    "knn",
    "knn_scores",
    "linear_probe",
    "nearest",
    "read_labels",
    "sgd_probe",
    "share_of",
    "svm_probe",
]
