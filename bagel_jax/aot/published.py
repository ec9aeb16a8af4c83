"""The sizes of BAGEL-7B-MoT, as `checkpoint.sizes.read_config` reads them from what ByteDance-Seed published."""

from __future__ import annotations

from bagel_jax.config import AutoencoderConfig, BagelConfig, TrunkConfig, VitConfig

PUBLISHED = BagelConfig(
    trunk=TrunkConfig(
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_width=18944,
        rope_theta=1000000.0,
        norm_eps=1e-06,
        activation="silu",
    ),
    vit=VitConfig(
        hidden_size=1152,
        num_layers=26,
        num_heads=16,
        mlp_width=4304,
        patch_size=14,
        num_positions=4900,
        channels=3,
        norm_eps=1e-06,
        activation="gelu_pytorch_tanh",
    ),
    autoencoder=AutoencoderConfig(
        image_channels=3,
        base_width=128,
        widths=(128, 256, 512, 512),
        num_res_blocks=2,
        latent_channels=16,
        scale_factor=0.3611,
        shift_factor=0.1159,
    ),
    latent_patch_size=2,
    max_latent_size=64,
    max_vit_patches=70,
    connector_activation="gelu_pytorch_tanh",
    time_frequencies=256,
    interpolate_positions=False,
)
