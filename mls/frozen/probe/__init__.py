"""What frozen features know about labels: kNN votes, linear classifiers with chosen settings, the support vector
machine of the literature. The monitor uses them during a run, eval/ after it. Extracting features is not done here."""

from mls.frozen.probe.labels import Labels, few_shot, held_out_split, read_labels
from mls.frozen.probe.linear import Probe, Tried, fit_linear, linear_probe
from mls.frozen.probe.neighbours import Knn, knn, knn_scores, nearest
from mls.frozen.probe.sgd import sgd_probe
from mls.frozen.probe.svm import Svm, svm_probe

__all__ = [
    "Knn",
    "Labels",
    "Probe",
    "Svm",
    "Tried",
    "few_shot",
    "fit_linear",
    "held_out_split",
    "knn",
    "knn_scores",
    "linear_probe",
    "nearest",
    "read_labels",
    "sgd_probe",
    "svm_probe",
]
