//! Keys and values of past tokens, in pages.
//!
//! A slot has two tables of pages: one for the layers that see everything, one for the local layers, which
//! see their chunk of positions alone. The second begins anew at every multiple of the chunk, so it never
//! holds more than a chunk. A page holds all layers of its kind for `page_tokens` positions. Slots with a
//! common beginning share pages; whoever writes to a shared page copies it first.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use scoutd_kernels::{KvPages, Vector};

use super::KvType;
use super::shape::Shape;

/// The cache of all slots.
pub(super) struct KvCache {
    layout: Layout,
    slots: Vec<Slot>,
    /// Bytes of all live pages.
    in_use: Arc<AtomicU64>,
}

/// What every page of a cache has in common.
#[derive(Clone, Debug)]
struct Layout {
    kv_type: KvType,
    page_tokens: usize,
    kv_heads: usize,
    head_len: usize,
    chunk: Option<usize>,
    /// For each layer its place among the layers of its kind.
    places: Vec<Place>,
    global_layers: usize,
    local_layers: usize,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    local: bool,
    index: usize,
}

/// The pages of one sequence.
#[derive(Clone, Default)]
struct Slot {
    len: usize,
    global: Vec<Arc<Page>>,
    local: Vec<Arc<Page>>,
    /// The position where `local` begins: a multiple of the chunk.
    local_start: usize,
}

/// For each layer of a kind, for each KV head: `page_tokens` keys, then as many values.
struct Page {
    values: Values,
    in_use: Arc<AtomicU64>,
}

#[derive(Clone)]
enum Values {
    F32(Vec<f32>),
    F16(Vec<u16>),
}

/// Lists of page slices, kept so that a step allocates nothing.
#[derive(Default)]
pub(super) struct PageLists {
    f32: [Vec<&'static [f32]>; 2],
    f16: [Vec<&'static [u16]>; 2],
}

impl KvCache {
    /// A cache of `slots` empty slots.
    pub(super) fn new(shape: &Shape, kv_type: KvType, page_tokens: usize, slots: usize) -> KvCache {
        let (mut global_layers, mut local_layers) = (0, 0);
        let places = shape.layers.iter().map(|layer| {
            let count = if layer.local { &mut local_layers } else { &mut global_layers };
            let index = *count;
            *count += 1;
            Place { local: layer.local, index }
        });
        let places = places.collect();
        let layout = Layout {
            kv_type,
            page_tokens,
            kv_heads: shape.kv_heads,
            head_len: shape.head_len,
            chunk: shape.chunk,
            places,
            global_layers,
            local_layers,
        };
        KvCache { layout, slots: vec![Slot::default(); slots], in_use: Arc::default() }
    }

    pub(super) fn slots(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn page_tokens(&self) -> usize {
        self.layout.page_tokens
    }

    /// Tokens of `slot`; none if there is no such slot.
    pub(super) fn len(&self, slot: usize) -> usize {
        self.slots.get(slot).map_or(0, |slot| slot.len)
    }

    /// Bytes of the pages in use, shared ones counted once.
    pub(super) fn bytes_in_use(&self) -> u64 {
        self.in_use.load(Ordering::Relaxed)
    }

    /// Empties `slot`. Its pages are freed unless others share them.
    pub(super) fn clear(&mut self, slot: usize) {
        if let Some(slot) = self.slots.get_mut(slot) {
            *slot = Slot::default();
        }
    }

    /// Makes `to` begin with the first `len` tokens of `from`, and returns how many it then holds. Where
    /// `len` lies in a chunk whose local pages are gone, it is the chunk's beginning: there local layers
    /// need no past.
    pub(super) fn share_prefix(&mut self, from: usize, to: usize, len: usize) -> usize {
        if from >= self.slots.len() || to >= self.slots.len() {
            return 0;
        }
        let source = &self.slots[from];
        let mut len = len.min(source.len);
        let mut local_pages = 0;
        let mut local_start = 0;
        if let Some(chunk) = self.layout.chunk {
            local_start = len / chunk * chunk;
            if local_start == source.local_start {
                local_pages = (len - local_start).div_ceil(self.layout.page_tokens);
            } else {
                len = local_start;
            }
        }
        let global_pages = self.pages_for(len, self.layout.global_layers);
        let shared = Slot {
            len,
            global: source.global[..global_pages].to_vec(),
            local: source.local[..local_pages.min(source.local.len())].to_vec(),
            local_start,
        };
        self.slots[to] = shared;
        len
    }

    fn pages_for(&self, tokens: usize, layers: usize) -> usize {
        if layers == 0 { 0 } else { tokens.div_ceil(self.layout.page_tokens) }
    }

    /// Makes room for `tokens` more tokens of `slot`: adds pages, copies those that are shared and will be
    /// written, and drops the local pages of a chunk that is over.
    ///
    /// # Panics
    /// If the tokens cross a border of chunks.
    pub(super) fn extend(&mut self, slot: usize, tokens: usize) {
        let KvCache { layout, slots, in_use } = self;
        let slot = &mut slots[slot];
        let end = slot.len + tokens;
        grow(&mut slot.global, layout, layout.global_layers, slot.len..end, in_use);
        if let Some(chunk) = layout.chunk {
            let start = slot.len / chunk * chunk;
            assert!(end <= start + chunk, "tokens beyond the chunk");
            if start != slot.local_start {
                slot.local.clear();
                slot.local_start = start;
            }
            let places = slot.len - start..end - start;
            grow(&mut slot.local, layout, layout.local_layers, places, in_use);
        }
    }

    /// Writes keys and values of a layer, rows of `kv_heads * head_len`, for the tokens after the slot's
    /// length. They count only after `advance`.
    ///
    /// # Panics
    /// If `extend` did not make room.
    pub(super) fn write(
        &mut self,
        vector: &Vector,
        slot: usize,
        layer: usize,
        keys: &[f32],
        values: &[f32],
    ) {
        let KvCache { layout, slots, .. } = self;
        let slot = &mut slots[slot];
        let place = layout.places[layer];
        let (pages, start) =
            if place.local { (&mut slot.local, slot.local_start) } else { (&mut slot.global, 0) };
        let (d, row) = (layout.head_len, layout.kv_heads * layout.head_len);
        for (offset, (keys, values)) in
            keys.chunks_exact(row).zip(values.chunks_exact(row)).enumerate()
        {
            let position = slot.len + offset - start;
            let within = position % layout.page_tokens;
            let page = Arc::get_mut(&mut pages[position / layout.page_tokens])
                .expect("`extend` copied the shared pages");
            for head in 0..layout.kv_heads {
                for (kind, row) in [keys, values].into_iter().enumerate() {
                    let at = layout.at(place.index, head, kind) + within * d;
                    page.values.write(vector, at, &row[head * d..(head + 1) * d]);
                }
            }
        }
    }

    /// Counts `tokens` more tokens, whose keys and values have been written in every layer.
    pub(super) fn advance(&mut self, slot: usize, tokens: usize) {
        self.slots[slot].len += tokens;
    }

    /// Lends the pages of one KV head of a layer, and says how many keys stand in them before the slot's
    /// length.
    pub(super) fn with_pages<R>(
        &self,
        slot: usize,
        layer: usize,
        head: usize,
        lists: &mut PageLists,
        use_pages: impl FnOnce(KvPages<'_>, usize) -> R,
    ) -> R {
        let layout = &self.layout;
        let slot = &self.slots[slot];
        let place = layout.places[layer];
        let (pages, start) =
            if place.local { (&slot.local, slot.local_start) } else { (&slot.global, 0) };
        let len = layout.page_tokens * layout.head_len;
        let at = [layout.at(place.index, head, 0), layout.at(place.index, head, 1)];
        let before = slot.len - start;
        match layout.kv_type {
            KvType::F32 => lend(&mut lists.f32, pages, at, len, Values::f32, |keys, values| {
                use_pages(KvPages::F32 { keys, values }, before)
            }),
            KvType::F16 => lend(&mut lists.f16, pages, at, len, Values::f16, |keys, values| {
                use_pages(KvPages::F16 { keys, values }, before)
            }),
        }
    }
}

/// Fills two lists with slices of all pages, and takes the lists back for the next time.
fn lend<E, R>(
    lists: &mut [Vec<&'static [E]>; 2],
    pages: &[Arc<Page>],
    at: [usize; 2],
    len: usize,
    values: fn(&Values) -> &[E],
    use_lists: impl FnOnce(&[&[E]], &[&[E]]) -> R,
) -> R {
    let [keys, list] = std::mem::take(lists);
    let (mut keys, mut list) = (emptied(keys), emptied(list));
    keys.extend(pages.iter().map(|page| &values(&page.values)[at[0]..at[0] + len]));
    list.extend(pages.iter().map(|page| &values(&page.values)[at[1]..at[1] + len]));
    let result = use_lists(&keys, &list);
    *lists = [emptied(keys), emptied(list)];
    result
}

/// An empty list of another lifetime. The standard library collects in place, so the allocation stays.
fn emptied<'b, E>(mut list: Vec<&[E]>) -> Vec<&'b [E]> {
    list.clear();
    list.into_iter().map(|_| -> &'b [E] { &[] }).collect()
}

/// Makes `pages` reach to the end of `places`, and those that will be written unshared.
fn grow(
    pages: &mut Vec<Arc<Page>>,
    layout: &Layout,
    layers: usize,
    places: Range<usize>,
    in_use: &Arc<AtomicU64>,
) {
    if layers == 0 {
        return;
    }
    let first = places.start / layout.page_tokens;
    for page in pages.iter_mut().skip(first) {
        if Arc::get_mut(page).is_none() {
            *page = Arc::new(Page::new(page.values.clone(), in_use));
        }
    }
    while pages.len() * layout.page_tokens < places.end {
        let values = Values::zeros(layout.kv_type, layout.at(layers, 0, 0));
        pages.push(Arc::new(Page::new(values, in_use)));
    }
}

impl Page {
    fn new(values: Values, in_use: &Arc<AtomicU64>) -> Page {
        in_use.fetch_add(values.bytes(), Ordering::Relaxed);
        Page { values, in_use: Arc::clone(in_use) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.in_use.fetch_sub(self.values.bytes(), Ordering::Relaxed);
    }
}

impl Values {
    fn zeros(kv_type: KvType, len: usize) -> Values {
        match kv_type {
            KvType::F32 => Values::F32(vec![0.0; len]),
            KvType::F16 => Values::F16(vec![0; len]),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Values::F32(values) => 4 * values.len() as u64,
            Values::F16(values) => 2 * values.len() as u64,
        }
    }

    fn f32(&self) -> &[f32] {
        match self {
            Values::F32(values) => values,
            Values::F16(_) => &[],
        }
    }

    fn f16(&self) -> &[u16] {
        match self {
            Values::F16(values) => values,
            Values::F32(_) => &[],
        }
    }

    fn write(&mut self, vector: &Vector, at: usize, row: &[f32]) {
        match self {
            Values::F32(values) => values[at..at + row.len()].copy_from_slice(row),
            Values::F16(values) => vector.f32_to_f16(row, &mut values[at..at + row.len()]),
        }
    }
}

impl Layout {
    /// Where the keys (kind 0) or values (kind 1) of a head begin in a page.
    fn at(&self, layer: usize, head: usize, kind: usize) -> usize {
        ((layer * self.kv_heads + head) * 2 + kind) * self.page_tokens * self.head_len
    }
}
