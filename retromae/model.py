"""RetroMAE: an encoder whose [CLS] vector alone must carry a text to a one-layer decoder.

Xiao et al. 2022, "RetroMAE: pre-training retrieval-oriented language models via masked auto-encoder", section 3;
the bag-of-words term: Liu et al. 2023, "RetroMAE-2: duplex masked auto-encoder", section 3.2.
Shape suffixes: B texts, L tokens (padded), N labelled positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lodestar.models.pooling import cls_of
from retromae.backbone import parts_of
from retromae.config import DecoderConfig, MaskConfig
from retromae.decoder import Decoder
from retromae.loss import bag_of_words_nll, summed_nll
from retromae.masks import IGNORED, decoder_visibility


class RetroMAE(nn.Module):
    """Encoder with its language-model head, and the decoder that shares its embeddings and head."""

    def __init__(
        self, encoder: PreTrainedModel, *, mask: MaskConfig, decoder: DecoderConfig, max_length: int, bag_of_words: bool
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder.for_encoder(encoder.config)
        self._parts = parts_of(encoder)
        self._mask, self._query, self._bag_of_words = mask, decoder.query, bag_of_words
        self.positions: nn.Embedding | None = None
        if self._parts.positions is None:  # rotary positions: the decoder needs a table of its own
            self.positions = nn.Embedding(max_length, encoder.config.hidden_size)
            nn.init.normal_(self.positions.weight, std=encoder.config.initializer_range)

    def forward(
        self,
        masked_input_ids_BL: Tensor,
        labels_BL: Tensor,
        input_ids_BL: Tensor,
        words_BL: Tensor,
        lengths_B: Tensor,
        rng_key_B: Tensor,
        is_real_example_B: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of nats, (), fp32: of the encoder and the decoder over their labels, of the bag of words over texts.

        The arguments are the fields of `retromae.collate.MicroBatch`.
        """
        parts = self._parts
        position_L = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
        attention_mask_BL = position_L < lengths_B[:, None]
        hidden_BLD = parts.base(
            input_ids=masked_input_ids_BL, attention_mask=attention_mask_BL.long()
        ).last_hidden_state
        has_label_BL = labels_BL != IGNORED
        encoder_nats = self._nats(hidden_BLD[has_label_BL], labels_BL[has_label_BL])

        attention_mask_B1LL = decoder_visibility(
            words_BL, lengths_B, rng_key_B, self._mask.decoder, self._mask.decoder_sets
        )
        decoded_BLD = self._decode(cls_of(hidden_BLD), input_ids_BL, position_L, attention_mask_B1LL)
        has_decoder_label_BL = (position_L > 0) & (position_L < lengths_B[:, None] - 1) & is_real_example_B[:, None]
        decoder_nats = self._nats(decoded_BLD[has_decoder_label_BL], input_ids_BL[has_decoder_label_BL])

        bag_nats = encoder_nats.new_zeros(())
        if self._bag_of_words:
            vocabulary = parts.vocabulary
            bag_nats = bag_of_words_nll(
                parts.head(hidden_BLD),
                vocabulary.weight,
                vocabulary.bias,
                input_ids_BL,
                (words_BL >= 0) & is_real_example_B[:, None],
            )
        return encoder_nats, decoder_nats, bag_nats

    def cls(self, ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, D): the [CLS] vectors of unmasked texts."""
        attention_mask_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < lengths_B[:, None]
        return cls_of(self._parts.base(input_ids=ids_BL, attention_mask=attention_mask_BL.long()).last_hidden_state)

    def _decode(self, cls_BD: Tensor, input_ids_BL: Tensor, position_L: Tensor, attention_mask_B1LL: Tensor) -> Tensor:
        """(B, L, D): the decoder's hidden states."""
        parts = self._parts
        embedded_BLD = parts.embeddings(input_ids=input_ids_BL)
        if self.positions is not None:
            position_LD = self.positions(position_L)
            embedded_BLD = embedded_BLD + position_LD
        else:
            position_LD = parts.positions(position_L + parts.first_position)  # type: ignore[misc]
        cls_B1D = cls_BD[:, None]
        hiddens_BLD = torch.cat([cls_B1D, embedded_BLD[:, 1:]], dim=1)
        if self._query == "positions":
            query_BLD = position_LD + cls_B1D
        else:
            query_BLD = parts.embeddings(inputs_embeds=cls_B1D.expand_as(embedded_BLD))
            if self.positions is not None:
                query_BLD = query_BLD + position_LD
        return self.decoder(query_BLD, hiddens_BLD, attention_mask_B1LL)

    def _nats(self, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        """(): the summed nats of the language-model head."""
        vocabulary = self._parts.vocabulary
        return summed_nll(self._parts.head(hidden_ND), vocabulary.weight, vocabulary.bias, target_N)
