//! The files of a checkpoint beside its weights.

use nics_core::train::words;
use nics_core::vision::{PreprocessorConfig, Processor};
use nics_datasets::symbol_grid::{
    ASSISTANT, CELL, CELLS, EDGE, EOS, EOS_ID, IMAGE, IMAGE_ID, LEVELS, SIDE, UNKNOWN, USER, vocabulary,
};
use serde_json::{Value, json};

use super::Recipe;
use crate::{Error, Result};

/// Positions that the models are made for.
const CONTEXT: usize = 256;
const UNKNOWN_ID: u32 = 0;

/// A config.json of LLaVA with the fields of a recipe in it.
pub(super) fn config(recipe: &Recipe) -> Value {
    let text = words::llama_config(vocabulary().len(), CONTEXT, EOS_ID, UNKNOWN_ID);
    let vision = json!({
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "num_channels": 3,
        "image_size": EDGE,
        "patch_size": CELL,
        "vision_use_head": false,
        "torch_dtype": "bfloat16",
    });
    json!({
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": IMAGE_ID,
        "image_seq_length": CELLS,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": true,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "text_config": words::with_fields(text, &recipe.text_config),
        "vision_config": words::with_fields(vision, &recipe.vision_config),
    })
}

/// A preprocessor_config.json under which the tower sees the numbers that a picture stands for.
pub(super) fn preprocessor_config() -> Value {
    json!({
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": true,
        "do_resize": true,
        "size": { "height": EDGE, "width": EDGE },
        "resample": 3,
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": vec![LEVELS / 255.0; 3],
    })
}

/// What prepares pictures for a model of this config.json.
pub(super) fn processor(config: &Value) -> Result<Processor> {
    let object = |value: &Value| {
        value.as_object().cloned().ok_or_else(|| Error::Input("a configuration is no object".into()))
    };
    let preprocessor = PreprocessorConfig::parse(object(&preprocessor_config())?)?;
    Ok(Processor::new(&object(config)?, &preprocessor)?)
}

/// Tokens with a role.
const ADDED: [(u32, &str); 3] = [(UNKNOWN_ID, UNKNOWN), (EOS_ID, EOS), (IMAGE_ID, IMAGE)];

/// A tokenizer.json: words between white space.
pub(super) fn tokenizer() -> Value {
    words::tokenizer(&vocabulary(), &words::added_tokens(&ADDED), UNKNOWN)
}

/// A conversation as LLaVA's templates write it: one line, images first.
fn chat_template() -> String {
    format!(
        "{{%- for message in messages %}}{{%- if message.role == 'user' %}}{USER} {{% else %}}{ASSISTANT} {{% endif %}}\
         {{%- if message.content is string %}}{{{{ message.content }}}}{{%- else %}}\
         {{%- for part in message.content if part.type == 'image' %}}{IMAGE} {{% endfor %}}\
         {{%- for part in message.content if part.type == 'text' %}}{{{{ part.text }}}}{{%- endfor %}}{{%- endif %}}\
         {{%- if message.role == 'assistant' %}} {EOS}{{% endif %}}{{{{ ' ' if not loop.last }}}}{{%- endfor %}}\
         {{%- if add_generation_prompt %}} {ASSISTANT}{{%- endif %}}"
    )
}

/// A tokenizer_config.json.
pub(super) fn tokenizer_config() -> Value {
    json!({
        "add_bos_token": false,
        "add_eos_token": false,
        "added_tokens_decoder": words::added_tokens_decoder(&ADDED),
        "additional_special_tokens": [IMAGE],
        "eos_token": EOS,
        "pad_token": UNKNOWN,
        "unk_token": UNKNOWN,
        "image_token": IMAGE,
        "chat_template": chat_template(),
        "clean_up_tokenization_spaces": false,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

/// A generation_config.json.
pub(super) fn generation_config() -> Value {
    json!({
        "eos_token_id": [EOS_ID],
        "pad_token_id": UNKNOWN_ID,
        "do_sample": false,
        "max_new_tokens": SIDE + 1,
    })
}
