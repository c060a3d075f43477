"""What tasks measure on given embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval.evaluation.task_metrics import classify, cluster, pair_classification_scores, spearman
from retrieval.evaluation.tasks import undersample


def test_separable_embeddings_are_classified_and_clustered_and_noise_is_not():
    chance = np.random.default_rng(0)
    labels_I = np.arange(90) % 3
    near_ID, noise_ID = np.eye(3)[labels_I] + 0.01 * chance.normal(size=(90, 3)), chance.normal(size=(90, 3))
    rows_EM = undersample([str(label) for label in labels_I], 8, 3, seed=0)
    for x_ID, least, most in ((near_ID, 1.0, 1.0), (noise_ID, 0.0, 0.6)):
        found = classify(x_ID, labels_I, rows_EM, x_ID, labels_I, seed=0)
        assert least <= found.metrics["accuracy"] <= most and least <= found.metrics["macro_f1"] <= most
        assert found.item_I.mean() == pytest.approx(found.metrics["accuracy"])
        assert least <= cluster(x_ID, [str(label) for label in labels_I], seed=0).metrics["v_measure"] <= most


def test_pairs_are_measured_as_counted_by_hand():
    score_I, label_I = np.array([0.0, 1.0, 2.0, 5.0]), np.array([0, 1, 0, 1])
    assert spearman(np.array([0.1, 0.2, 0.3, 0.9]), score_I).metrics == {"spearman": pytest.approx(1)}
    assert spearman(np.array([0.9, 0.3, 0.2, 0.1]), score_I).metrics == {"spearman": pytest.approx(-1)}
    # by falling cosine 1 0 1 0: precision at the two positives is 1 and 2/3; best F1 takes the first three
    found = pair_classification_scores(np.array([0.1, 0.5, 0.6, 0.9]), label_I).metrics
    assert found == {"average_precision": pytest.approx(5 / 6), "best_f1": pytest.approx(0.8)}
    assert pair_classification_scores(np.array([0.9, 0.5, 0.6, 0.1]), label_I).metrics["average_precision"] < 0.5
