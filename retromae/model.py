"""RetroMAE: an encoder whose [CLS] vector alone must carry a text to a one-layer decoder.

Xiao et al. 2022, "RetroMAE: pre-training retrieval-oriented language models via masked auto-encoder", section 3;
the bag-of-words term: Liu et al. 2023, "RetroMAE-2: duplex masked auto-encoder", section 3.2.
Shape suffixes: B texts, L tokens (padded), T tokens of packed texts, N and M labels of encoder and decoder, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lodestar.data.padding import TextShape
from lodestar.models.hidden_states import first_tokens, hidden_states, unpacked
from lodestar.models.pooling import cls_of
from retromae.backbone import parts_of
from retromae.config import DecoderConfig, MaskConfig
from retromae.decoder import Decoder
from retromae.loss import bag_of_words_nll, summed_nll
from retromae.masks import decoder_visibility


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
        masked_input_ids: Tensor,
        input_ids_BL: Tensor,
        words_BL: Tensor,
        lengths_B: Tensor,
        rng_key_B: Tensor,
        encoder_index_N: Tensor,
        encoder_target_N: Tensor,
        decoder_index_M: Tensor,
        shape: TextShape,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of nats, (), fp32: of the encoder and the decoder over their labels, of the bag of words over texts.

        masked_input_ids   the encoder's input: (B, L), or (T,) where texts are packed
        input_ids_BL       clean ids
        words_BL           index of each token's word, -1 where there is none
        rng_key_B          int64, the counter-based key of each text, for the decoder's masks
        encoder_index_N    places of the encoder's labels in `masked_input_ids`, flattened
        decoder_index_M    places of the decoder's labels in `input_ids_BL`, flattened
        """
        parts = self._parts
        position_L = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
        # Before the encoder: a GPU is then never without work while the host queues the many small steps of the masks.
        attention_mask_B1LL = decoder_visibility(
            words_BL, lengths_B, rng_key_B, self._mask.decoder, self._mask.decoder_sets
        )
        hidden = hidden_states(parts.base, masked_input_ids, lengths_B, shape)
        flat_hidden = hidden.flatten(0, -2)
        encoder_nats = self._nats(flat_hidden.index_select(0, encoder_index_N), encoder_target_N)

        first_B = first_tokens(lengths_B, None if hidden.ndim == 2 else hidden.shape[1])
        decoded_BLD = self._decode(flat_hidden.index_select(0, first_B), input_ids_BL, position_L, attention_mask_B1LL)
        decoder_nats = self._nats(
            decoded_BLD.flatten(0, 1).index_select(0, decoder_index_M),
            input_ids_BL.flatten().index_select(0, decoder_index_M),
        )
        bag_nats = encoder_nats.new_zeros(())
        if self._bag_of_words:
            vocabulary = parts.vocabulary
            hidden_BLD = hidden if hidden.ndim == 3 else unpacked(hidden, lengths_B, input_ids_BL.shape[1])
            bag_nats = bag_of_words_nll(
                parts.head(hidden_BLD), vocabulary.weight, vocabulary.bias, input_ids_BL, words_BL >= 0
            )
        return encoder_nats, decoder_nats, bag_nats

    def cls(self, ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, D): the [CLS] vectors of unmasked texts."""
        return cls_of(hidden_states(self._parts.base, ids_BL, lengths_B))

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
