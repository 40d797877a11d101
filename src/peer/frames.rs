//! Cuts a streamed answer into frames: server-sent events or lines of JSON, as bytes come.
//!
//! The bytes are a stranger's, so everything is bounded: a line, an event, and all of an answer together.

/// How an answer is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// One JSON object per line.
    Lines,
    /// Server-sent events; a frame is an event's data.
    Events,
    /// One JSON document, line ends and all: a server that does not stream.
    Whole,
}

/// More bytes than an answer may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the answer is too large")]
pub struct TooLarge;

/// Bytes of one line or one event; a whole answer that comes unstreamed is one line.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// Bytes of an answer with everything around its text. An event of a few characters takes 250 bytes.
pub const WIRE_BYTES_MAX: usize = 32 << 20;

/// Puts frames together from pieces of any size.
#[derive(Debug)]
pub struct Frames {
    framing: Framing,
    line: Vec<u8>,
    /// The data lines of the event being read.
    data: Option<Vec<u8>>,
    /// The last byte was a carriage return, so a line feed now belongs to it.
    after_return: bool,
    bytes: usize,
    foreign: bool,
}

impl Frames {
    /// Nothing read yet.
    pub fn new(framing: Framing) -> Frames {
        Frames {
            framing,
            line: Vec::new(),
            data: None,
            after_return: false,
            bytes: 0,
            foreign: false,
        }
    }

    /// Takes the next bytes and appends every frame they complete to `out`.
    ///
    /// # Errors
    /// If a bound is passed; nothing may be read after that.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<Vec<u8>>) -> Result<(), TooLarge> {
        self.bytes += bytes.len();
        if self.bytes > WIRE_BYTES_MAX {
            return Err(TooLarge);
        }
        let mut rest = bytes;
        if self.framing == Framing::Whole {
            self.append(std::mem::take(&mut rest))?;
        }
        while !rest.is_empty() {
            if std::mem::take(&mut self.after_return) && rest[0] == b'\n' {
                rest = &rest[1..];
                continue;
            }
            let end = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
            let (piece, ended) = rest.split_at(end.unwrap_or(rest.len()));
            self.append(piece)?;
            let Some(&terminator) = ended.first() else { break };
            self.after_return = terminator == b'\r';
            rest = &ended[1..];
            self.end_line(out)?;
        }
        Ok(())
    }

    /// Whether there was a line that no event stream has: the answer is something else, a web page perhaps.
    pub fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// What the last bytes amount to if the answer ends here: a server may leave the last line end out.
    ///
    /// # Errors
    /// As [`Frames::push`].
    pub fn finish(&mut self, out: &mut Vec<Vec<u8>>) -> Result<(), TooLarge> {
        if !self.line.is_empty() {
            self.end_line(out)?;
        }
        out.extend(self.data.take());
        Ok(())
    }

    fn append(&mut self, piece: &[u8]) -> Result<(), TooLarge> {
        if self.line.len() + piece.len() > FRAME_BYTES_MAX {
            return Err(TooLarge);
        }
        self.line.extend_from_slice(piece);
        Ok(())
    }

    fn end_line(&mut self, out: &mut Vec<Vec<u8>>) -> Result<(), TooLarge> {
        let line = std::mem::take(&mut self.line);
        match self.framing {
            Framing::Lines | Framing::Whole => {
                if !line.iter().all(u8::is_ascii_whitespace) {
                    out.push(line);
                }
                Ok(())
            }
            Framing::Events if line.is_empty() => {
                out.extend(self.data.take());
                Ok(())
            }
            Framing::Events => self.field(&line),
        }
    }

    /// A line of an event: only `data` matters here; comments begin with a colon.
    fn field(&mut self, line: &[u8]) -> Result<(), TooLarge> {
        let value = match line.strip_prefix(b"data") {
            Some([]) => &[][..],
            Some([b':', value @ ..]) => value.strip_prefix(b" ").unwrap_or(value),
            _ => {
                let known = [&b":"[..], b"event", b"id", b"retry"];
                self.foreign |= !known.iter().any(|name| line.starts_with(name));
                return Ok(());
            }
        };
        match &mut self.data {
            None => self.data = Some(value.to_vec()),
            Some(data) if data.len() + value.len() >= FRAME_BYTES_MAX => return Err(TooLarge),
            Some(data) => {
                data.push(b'\n');
                data.extend_from_slice(value);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(framing: Framing, bytes: &[u8], piece: usize) -> Vec<String> {
        let mut frames = Frames::new(framing);
        let mut out = Vec::new();
        for piece in bytes.chunks(piece) {
            frames.push(piece, &mut out).expect("small");
        }
        frames.finish(&mut out).expect("small");
        out.into_iter().map(|frame| String::from_utf8(frame).expect("text")).collect()
    }

    /// The same however the bytes are cut.
    fn check(framing: Framing, text: &str, expected: &[&str]) {
        for piece in 1..=text.len().max(1) {
            assert_eq!(frames(framing, text.as_bytes(), piece), expected, "{text:?} by {piece}");
        }
    }

    #[test]
    fn events() {
        let check = |text, expected: &[&str]| check(Framing::Events, text, expected);
        check("", &[]);
        check("data: a\n\ndata: b\n\n", &["a", "b"]);
        check("data:a\r\n\r\ndata:  b\r\n\r\n", &["a", " b"]);
        check("data: a\r\rdata: b\r\r", &["a", "b"]);
        check("data: a\ndata\ndata: b\n\n", &["a\n\nb"]);
        check(": ping\n\n: ping\n\nevent: x\nid: 1\ndata: ü\n\n", &["ü"]);
        check("database: no\n\ndata: {\"a\":1}", &["{\"a\":1}"]);
        check("\n\n\n", &[]);
    }

    #[test]
    fn lines() {
        let check = |text, expected: &[&str]| check(Framing::Lines, text, expected);
        check("{}\n{\"a\":1}\n", &["{}", "{\"a\":1}"]);
        check("{}\r\n\r\n \n{}", &["{}", "{}"]);
        check("", &[]);
    }

    #[test]
    fn a_web_page_is_no_event_stream() {
        for (text, foreign) in
            [("<html>\n</html>\n", true), (": ping\n\nid: 1\nretry: 5\n\n", false)]
        {
            let mut frames = Frames::new(Framing::Events);
            frames.push(text.as_bytes(), &mut Vec::new()).expect("small");
            assert_eq!(frames.is_foreign(), foreign, "{text}");
        }
    }

    #[test]
    fn one_document() {
        check(Framing::Whole, "{\n \"a\": 1\r\n}\n", &["{\n \"a\": 1\r\n}\n"]);
        check(Framing::Whole, "", &[]);
        check(Framing::Whole, " \n", &[]);
    }

    #[test]
    fn everything_is_bounded() {
        let flood = vec![b'x'; 64 * 1024];
        for framing in [Framing::Lines, Framing::Events, Framing::Whole] {
            let mut frames = Frames::new(framing);
            let mut taken = 0;
            while frames.push(&flood, &mut Vec::new()).is_ok() {
                taken += flood.len();
                assert!(taken <= FRAME_BYTES_MAX, "an endless line is cut");
            }
        }
        let mut frames = Frames::new(Framing::Events);
        let pings = b": ping\n\n".repeat(8192);
        let mut taken = 0;
        while frames.push(&pings, &mut Vec::new()).is_ok() {
            taken += pings.len();
            assert!(taken <= WIRE_BYTES_MAX, "endless comments are cut");
        }
        let mut frames = Frames::new(Framing::Events);
        let line = [b"data: ".to_vec(), vec![b'y'; 1000], b"\n".to_vec()].concat();
        let mut taken = 0;
        while frames.push(&line, &mut Vec::new()).is_ok() {
            taken += 1000;
            assert!(taken <= FRAME_BYTES_MAX, "an endless event is cut");
        }
    }
}
