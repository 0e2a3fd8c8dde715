use crate::{
    Chunk, Error, LoadPlan, LoadWatch, Phase, Progress, Result, WeightBackend, WeightClass, WeightSource,
};

/// Host memory that a pushed load uses for its chunks.
const CHUNK_BYTES: u64 = 4 << 20;

/// Reads the whole plan and uploads it chunk by chunk: what [`WeightBackend::load_from`] does by default.
///
/// # Errors
/// What the source and the uploads return, and [`Error::Cancelled`].
pub fn push_all<B: WeightBackend + ?Sized>(
    backend: &mut B,
    plan: &LoadPlan,
    source: &dyn WeightSource,
    watch: &dyn LoadWatch,
) -> Result<()> {
    let mut buffer = Vec::new();
    let mut done = 0;
    for weight in &plan.weights {
        let granule = weight.granule();
        let step = (CHUNK_BYTES / granule).max(1) * granule;
        let mut offset = 0;
        while offset < weight.nbytes {
            if watch.cancelled() {
                return Err(Error::Cancelled);
            }
            watch.progress(Progress {
                phase: Phase::Upload,
                weight: Some(weight.id),
                done,
                total: plan.nbytes,
            });
            let len = step.min(weight.nbytes - offset);
            let len_host =
                usize::try_from(len).map_err(|_| Error::internal("push_all", "a chunk exceeds memory"))?;
            buffer.resize(len_host, 0);
            source.read_at(weight.id, offset, &mut buffer)?;
            let chunk = Chunk {
                weight: weight.id,
                offset,
                bytes: &buffer,
            };
            match weight.class {
                WeightClass::Quantized => backend.upload_quantized(chunk)?,
                WeightClass::Float | WeightClass::Bias => backend.upload_f32(chunk)?,
                WeightClass::Gamma => backend.upload_gamma(chunk)?,
            }
            offset += len;
            done += len;
        }
    }
    watch.progress(Progress {
        phase: Phase::Upload,
        weight: None,
        done,
        total: plan.nbytes,
    });
    Ok(())
}
