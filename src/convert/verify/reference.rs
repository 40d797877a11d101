//! The reference as a GGUF file: one that is given, or a checkpoint converted for this comparison.

use std::fs;
use std::path::{Path, PathBuf};

use scoutd_kernels::Format;

use super::super::checkpoint::Checkpoint;
use super::super::input::Input;
use super::super::run::{self, Observer, Part, convert};
use super::super::{ALIGNMENT_OURS, Base, ConvertError, Plan, Recipe, plan};
use super::error::VerifyError;
use super::{Options, Progress, Unit};

/// Where the reference comes from.
pub(super) enum Reference {
    /// A GGUF file that is there.
    File(PathBuf),
    /// One that is to be made of a checkpoint, and taken away afterwards unless it is kept.
    Made { how: Box<run::Options>, bytes: u64, keep: bool },
}

/// A reference that is ready; removes its file when dropped, if it is not to be kept.
pub(super) struct Ready {
    path: PathBuf,
    temporary: bool,
}

impl Ready {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if self.temporary {
            // Best effort: a file that stays is named by the next run.
            drop(fs::remove_file(&self.path));
        }
    }
}

impl Reference {
    /// Finds out what there is to do. Writes nothing.
    pub(super) fn plan(options: &Options, dir: &Path) -> Result<Reference, VerifyError> {
        let source = &options.against;
        if !fs::metadata(source).map_err(VerifyError::io(source))?.is_dir() {
            return Ok(Reference::File(source.clone()));
        }
        let format = match options.reference_type {
            Some(format) => format,
            None => prevailing(source)?,
        };
        let stem = options.file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let target = dir.join(format!("{stem}.reference.gguf"));
        let how = run::Options {
            source: source.clone(),
            target: target.clone(),
            recipe: Recipe { base: Base::Pure(format), overrides: Vec::new() },
            name: None,
            knows_tools: false,
            alignment: ALIGNMENT_OURS,
            threads: options.threads,
            resume: false,
            // Only for what an interrupted run left: the target itself is not there.
            force: true,
        };
        let plan = plan(&how, |plan, _| Ok(plan))?;
        if !target.exists() {
            return Ok(Reference::Made {
                how: Box::new(how),
                bytes: plan.bytes,
                keep: options.keep,
            });
        }
        if is_made_by(&plan, &target, source)? {
            return Ok(Reference::File(target));
        }
        Err(VerifyError::OtherReference(target))
    }

    /// Bytes of the file.
    pub(super) fn bytes(&self) -> Result<u64, VerifyError> {
        match self {
            Reference::File(path) => Ok(fs::metadata(path).map_err(VerifyError::io(path))?.len()),
            Reference::Made { bytes, .. } => Ok(*bytes),
        }
    }

    pub(super) fn bytes_to_write(&self) -> u64 {
        match self {
            Reference::File(_) => 0,
            Reference::Made { bytes, .. } => *bytes,
        }
    }

    /// Makes it, if it has to be made.
    pub(super) fn make(self, progress: &dyn Progress) -> Result<Ready, VerifyError> {
        match self {
            Reference::File(path) => Ok(Ready { path, temporary: false }),
            Reference::Made { how, keep, .. } => {
                convert(&how, &Converting(progress))?;
                Ok(Ready { path: how.target, temporary: !keep })
            }
        }
    }
}

/// The type of most weights of a checkpoint: no value is rounded to it.
fn prevailing(dir: &Path) -> Result<Format, ConvertError> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut bytes = [(Format::F32, 0), (Format::F16, 0), (Format::Bf16, 0)];
    for name in checkpoint.names() {
        // What is not read (a vision part in another type) has no say.
        let (Ok(format), Some(entry)) = (checkpoint.format(name), checkpoint.entry(name)) else {
            continue;
        };
        for (of, sum) in &mut bytes {
            *sum += if *of == format { entry.bytes } else { 0 };
        }
    }
    Ok(bytes.into_iter().max_by_key(|(_, sum)| *sum).map_or(Format::F32, |(format, _)| format))
}

/// Whether a file begins and ends where this conversion's would, and is younger than its source.
fn is_made_by(plan: &Plan, file: &Path, source: &Path) -> Result<bool, VerifyError> {
    let wrong = VerifyError::io(file);
    let info = fs::metadata(file).map_err(VerifyError::io(file))?;
    let made = info.modified().map_err(VerifyError::io(file))?;
    for entry in fs::read_dir(source).map_err(VerifyError::io(source))? {
        let changed = entry.and_then(|entry| entry.metadata()).and_then(|info| info.modified());
        if changed.map_err(VerifyError::io(source))? > made {
            return Ok(false);
        }
    }
    let mut header = vec![0; plan.header.len().min(info.len() as usize)];
    let opened = fs::File::open(file);
    opened.and_then(|mut file| std::io::Read::read_exact(&mut file, &mut header)).map_err(wrong)?;
    Ok(info.len() == plan.bytes && header == plan.header)
}

/// The conversion's progress as a stage of ours.
struct Converting<'a>(&'a dyn Progress);

impl Observer for Converting<'_> {
    fn planned(&self, _: &Plan) {}

    fn begin(&self, part: Part, bytes: u64) {
        let stage = match part {
            Part::Resume | Part::Convert => "making the reference",
            Part::Check => "reading it back",
        };
        self.0.begin(stage, Unit::Bytes, bytes);
    }

    fn passed(&self, bytes: u64) {
        self.0.passed(bytes);
    }
}
