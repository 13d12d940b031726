from czsl_heads.adapters.bottleneck import add_bottlenecks as add_bottlenecks
from czsl_heads.adapters.experts import add_experts as add_experts
from czsl_heads.adapters.lora import add_lora as add_lora
from czsl_heads.adapters.lora import merge_lora as merge_lora
from czsl_heads.adapters.lora import remove_lora as remove_lora
from czsl_heads.adapters.lora import unmerge_lora as unmerge_lora
