"""Losses on descriptors of two views whose 3D points are known (docs/losses.md).

Two pixels are a positive pair when their object points are at most ``pos_radius`` apart, a negative
pair when they are farther apart than ``neg_radius``, and what lies between is ignored; only
`soft_labels` weighs all distances instead. Rows are keypoints of view 0, columns those of view 1.
Descriptors of other pairs may be given as further negatives; they never are positives.
"""

from equifeat.loss.average_precision import SmoothAPTerms, smooth_ap, smooth_ap_terms
from equifeat.loss.contrastive import info_nce
from equifeat.loss.multi_positive import multi_positive_ap
from equifeat.loss.optimal_transport import transport
from equifeat.loss.pairs import ExtraNegatives, count_positives
from equifeat.loss.position_labels import soft_labels

__all__ = [
    "ExtraNegatives",
    "SmoothAPTerms",
    "count_positives",
    "info_nce",
    "multi_positive_ap",
    "smooth_ap",
    "smooth_ap_terms",
    "soft_labels",
    "transport",
]
