"""Store the model of 01_prune.py packed, and run it in transformers."""

from transformers import AutoModelForCausalLM, AutoTokenizer

import halve

record = halve.pack("half", "packed")
print(f"{record.stored_bytes / record.dense_bytes:.1%} of the dense bytes")

# Importing halve is all that transformers needs: the matrices stay packed in memory.
model = AutoModelForCausalLM.from_pretrained("packed")
tokenizer = AutoTokenizer.from_pretrained("packed")
prompt = tokenizer("def main(", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(tokens[0]))
