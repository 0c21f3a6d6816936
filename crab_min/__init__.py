"""crab_min: Crab, Crab+, CREMA and PAVE, small enough to read. Importing it registers I-LoRA with PEFT."""
import crab_min.ilora  # noqa: F401
