//! A reader of the pickles that `torch.save` writes (protocol 2), and of nothing else.
//!
//! It builds plain values. A global is looked up in a list and never imported, a call is made only of the two functions
//! that rebuild tensors and ordered dictionaries, and every value takes at least a byte of input, so memory is bounded by
//! the length of the pickle. Values live in an arena and refer to each other by index: a value that contains itself costs
//! nothing and is refused when it is turned into a tree.

use std::collections::HashMap;

use super::Refusal;
use super::tree::{Global, StorageKind, TensorRef, Tree};

/// Nesting beyond this is no checkpoint.
const MAX_DEPTH: usize = 32;
/// A tree of more values is no checkpoint, however small its pickle.
const MAX_NODES: usize = 100_000;
/// Axes of a tensor.
const MAX_AXES: usize = 8;

#[derive(Debug, Clone)]
enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    /// Index of an [`Object`].
    Object(usize),
    Global(Global),
}

#[derive(Debug)]
enum Object {
    Text(String),
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dict { items: Vec<(Value, Value)>, ordered: bool },
    Storage { kind: StorageKind, key: String, numel: u64 },
    Tensor(TensorRef),
}

/// Runs a pickle and gives its value.
pub fn read(bytes: &[u8]) -> Result<Tree, Refusal> {
    let mut machine = Machine {
        bytes,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        objects: Vec::new(),
    };
    let value = machine.run()?;
    machine.tree(&value, 0, &mut 0)
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    /// Heights of the stack at open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    objects: Vec<Object>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Value, Refusal> {
        if self.bytes.first() != Some(&0x80) || self.bytes.get(1) != Some(&2) {
            return Err(self.damaged("it does not begin with protocol 2, which torch.save writes"));
        }
        self.at = 2;
        loop {
            let at = self.at;
            let opcode = self.take(1)?[0];
            match opcode {
                b'.' => {
                    let value = self.pop()?;
                    if !self.stack.is_empty() || !self.marks.is_empty() || self.at != self.bytes.len() {
                        return Err(self.damaged("there is more than one value"));
                    }
                    return Ok(value);
                }
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.stack.push(Value::None),
                0x88 => self.stack.push(Value::Bool(true)),
                0x89 => self.stack.push(Value::Bool(false)),
                b'K' => {
                    let value = i64::from(self.take(1)?[0]);
                    self.stack.push(Value::Int(value));
                }
                b'M' => {
                    let value = i64::from(u16::from_le_bytes(self.array()?));
                    self.stack.push(Value::Int(value));
                }
                b'J' => {
                    let value = i64::from(i32::from_le_bytes(self.array()?));
                    self.stack.push(Value::Int(value));
                }
                0x8a => self.long()?,
                b'G' => {
                    let value = f64::from_be_bytes(self.array()?);
                    self.stack.push(Value::Float(value));
                }
                b'X' => {
                    let len = u32::from_le_bytes(self.array()?) as usize;
                    let text = std::str::from_utf8(self.take(len)?)
                        .map_err(|_| Refusal::Pickle { at, reason: "a text is not UTF-8".into() })?
                        .to_owned();
                    self.push(Object::Text(text));
                }
                b'}' => self.push(Object::Dict { items: Vec::new(), ordered: false }),
                b']' => self.push(Object::List(Vec::new())),
                b')' => self.push(Object::Tuple(Vec::new())),
                0x85..=0x87 => {
                    let from = self.stack.len().checked_sub(usize::from(opcode - 0x84));
                    let from = from.filter(|from| *from >= self.floor());
                    let from = from.ok_or_else(|| self.damaged("the stack is too short for a tuple"))?;
                    let items = self.stack.split_off(from);
                    self.push(Object::Tuple(items));
                }
                b't' => {
                    let items = self.marked()?;
                    self.push(Object::Tuple(items));
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.marked()?;
                    self.append(items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(vec![key, value])?;
                }
                b'u' => {
                    let items = self.marked()?;
                    self.set(items)?;
                }
                b'q' => {
                    let index = u32::from(self.take(1)?[0]);
                    self.remember(index)?;
                }
                b'r' => {
                    let index = u32::from_le_bytes(self.array()?);
                    self.remember(index)?;
                }
                b'h' => {
                    let index = u32::from(self.take(1)?[0]);
                    self.recall(index)?;
                }
                b'j' => {
                    let index = u32::from_le_bytes(self.array()?);
                    self.recall(index)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let global = Global::find(&module, &name)
                        .ok_or_else(|| Refusal::Global(printable(&format!("{module}.{name}"))))?;
                    self.stack.push(Value::Global(global));
                }
                b'Q' => self.storage()?,
                b'R' => self.call()?,
                b'b' => self.build()?,
                _ => return Err(Refusal::Opcode { opcode, at }),
            }
        }
    }

    fn damaged(&self, reason: &str) -> Refusal {
        Refusal::Pickle { at: self.at, reason: reason.to_owned() }
    }

    fn take(&mut self, len: usize) -> Result<&[u8], Refusal> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else { return Err(self.damaged("it ends too early")) };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let at = self.at;
        let wrong = |_| Refusal::Pickle { at, reason: "it ends too early".into() };
        self.take(N)?.try_into().map_err(wrong)
    }

    /// Text up to the end of the line.
    fn line(&mut self) -> Result<String, Refusal> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|&b| b == b'\n').ok_or_else(|| self.damaged("a name has no end"))?;
        let line = String::from_utf8_lossy(&rest[..len]).into_owned();
        self.at += len + 1;
        Ok(line)
    }

    /// An integer of a length of its own; one beyond 64 bits is no size of anything.
    fn long(&mut self) -> Result<(), Refusal> {
        let len = usize::from(self.take(1)?[0]);
        if len > 8 {
            return Err(self.damaged("an integer has more than 64 bits"));
        }
        let mut bytes = [0; 8];
        let taken = self.take(len)?;
        bytes[..len].copy_from_slice(taken);
        if len > 0 && taken[len - 1] & 0x80 != 0 {
            bytes[len..].fill(0xff);
        }
        self.stack.push(Value::Int(i64::from_le_bytes(bytes)));
        Ok(())
    }

    /// Below this the stack belongs to what stands before the last mark.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Value, Refusal> {
        if self.stack.len() <= self.floor() {
            return Err(self.damaged("the stack is empty"));
        }
        self.stack.pop().ok_or_else(|| self.damaged("the stack is empty"))
    }

    fn marked(&mut self) -> Result<Vec<Value>, Refusal> {
        let from = self.marks.pop().ok_or_else(|| self.damaged("there is no mark"))?;
        Ok(self.stack.split_off(from))
    }

    fn push(&mut self, object: Object) {
        self.objects.push(object);
        self.stack.push(Value::Object(self.objects.len() - 1));
    }

    fn remember(&mut self, index: u32) -> Result<(), Refusal> {
        if self.stack.len() <= self.floor() {
            return Err(self.damaged("there is nothing to remember"));
        }
        let top = self.stack[self.stack.len() - 1].clone();
        self.memo.insert(index, top);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<(), Refusal> {
        let value = self.memo.get(&index).cloned();
        self.stack.push(value.ok_or_else(|| self.damaged(&format!("nothing was remembered as {index}")))?);
        Ok(())
    }

    /// The object on top of the stack, which stays there.
    fn top(&mut self) -> Result<&mut Object, Refusal> {
        let wrong = self.damaged("the value below is no list or dictionary");
        if self.stack.len() <= self.floor() {
            return Err(wrong);
        }
        match self.stack.last() {
            Some(Value::Object(i)) => Ok(&mut self.objects[*i]),
            _ => Err(wrong),
        }
    }

    fn append(&mut self, items: Vec<Value>) -> Result<(), Refusal> {
        let wrong = self.damaged("the value below is no list");
        match self.top()? {
            Object::List(list) => {
                list.extend(items);
                Ok(())
            }
            _ => Err(wrong),
        }
    }

    fn set(&mut self, items: Vec<Value>) -> Result<(), Refusal> {
        let wrong = self.damaged("the value below is no dictionary, or a key has no value");
        if !items.len().is_multiple_of(2) {
            return Err(wrong);
        }
        match self.top()? {
            Object::Dict { items: all, .. } => {
                let mut items = items.into_iter();
                while let (Some(key), Some(value)) = (items.next(), items.next()) {
                    all.push((key, value));
                }
                Ok(())
            }
            _ => Err(wrong),
        }
    }

    fn text(&self, value: &Value) -> Option<&str> {
        match value {
            Value::Object(i) => match &self.objects[*i] {
                Object::Text(text) => Some(text),
                _ => None,
            },
            _ => None,
        }
    }

    fn tuple(&self, value: &Value) -> Option<&[Value]> {
        match value {
            Value::Object(i) => match &self.objects[*i] {
                Object::Tuple(items) => Some(items),
                _ => None,
            },
            _ => None,
        }
    }

    /// `("storage", type, key, place, elements)`: a reference to the bytes of an entry.
    fn storage(&mut self) -> Result<(), Refusal> {
        let id = self.pop()?;
        let wrong = || Refusal::Call("for a persistent value that is no storage".into());
        let items = self.tuple(&id).ok_or_else(wrong)?;
        let [name, Value::Global(Global::Storage(kind)), key, place, Value::Int(numel)] = items else {
            return Err(wrong());
        };
        if self.text(name) != Some("storage") || self.text(place).is_none() {
            return Err(wrong());
        }
        let key = self.text(key).ok_or_else(wrong)?;
        if key.is_empty() || key.len() > 9 || !key.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Refusal::Call(format!("for the storage {:?}, which is no number", printable(key))));
        }
        let numel =
            u64::try_from(*numel).map_err(|_| Refusal::Call("for a storage of negative size".into()))?;
        let (kind, key) = (*kind, key.to_owned());
        self.push(Object::Storage { kind, key, numel });
        Ok(())
    }

    fn call(&mut self) -> Result<(), Refusal> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Some(arguments) = self.tuple(&arguments) else {
            return Err(self.damaged("a call has no tuple of arguments"));
        };
        match function {
            Value::Global(Global::OrderedDict) if arguments.is_empty() => {
                self.push(Object::Dict { items: Vec::new(), ordered: true });
                Ok(())
            }
            Value::Global(Global::RebuildTensor) => {
                let tensor = self.rebuild(arguments)?;
                self.push(Object::Tensor(tensor));
                Ok(())
            }
            Value::Global(Global::OrderedDict) => Err(Refusal::Call("OrderedDict with arguments".into())),
            Value::Global(Global::Storage(kind)) => Err(Refusal::Call(format!("the storage type {kind:?}"))),
            Value::Global(Global::Dtype) => Err(Refusal::Call("a dtype".into())),
            _ => Err(Refusal::Call("a value that is no function".into())),
        }
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`.
    fn rebuild(&self, arguments: &[Value]) -> Result<TensorRef, Refusal> {
        let wrong = |reason: &str| Refusal::Call(format!("_rebuild_tensor_v2 with {reason}"));
        let [Value::Object(storage), Value::Int(offset), size, stride, Value::Bool(_), Value::Object(hooks)] =
            arguments
        else {
            return Err(wrong("other arguments than storage, offset, size, stride, requires_grad, hooks"));
        };
        let Object::Storage { kind, key, numel } = &self.objects[*storage] else {
            return Err(wrong("something else than a storage"));
        };
        match &self.objects[*hooks] {
            Object::Dict { items, ordered: true } if items.is_empty() => {}
            _ => return Err(wrong("backward hooks")),
        }
        let integers = |value: &Value| -> Option<Vec<i64>> {
            self.tuple(value)?.iter().map(|v| if let Value::Int(n) = v { Some(*n) } else { None }).collect()
        };
        let (Some(shape), Some(stride)) = (integers(size), integers(stride)) else {
            return Err(wrong("a size or stride that is no tuple of integers"));
        };
        if shape.len() != stride.len() || shape.len() > MAX_AXES || shape.iter().any(|&n| n < 0) {
            return Err(wrong("a size that makes no sense"));
        }
        let mut expected: i64 = 1;
        for (&n, &step) in shape.iter().zip(&stride).rev() {
            if n > 1 && step != expected {
                return Err(wrong("a view; save the tensor with .contiguous()"));
            }
            expected = expected.checked_mul(n).ok_or_else(|| wrong("a size beyond 64 bits"))?;
        }
        let offset = u64::try_from(*offset).map_err(|_| wrong("a negative offset"))?;
        let end = offset.checked_add(expected as u64);
        if end.is_none_or(|end| end > *numel) {
            return Err(wrong(&format!("{expected} elements from {offset} of a storage of {numel}")));
        }
        Ok(TensorRef { key: key.clone(), kind: *kind, numel: *numel, offset, shape })
    }

    /// The state of an object: torch gives a state dict its `_metadata` so, which nothing here needs.
    fn build(&mut self) -> Result<(), Refusal> {
        let state = self.pop()?;
        let is_dict = |objects: &[Object], v: &Value| match v {
            Value::Object(i) => matches!(objects[*i], Object::Dict { .. }),
            _ => false,
        };
        if !is_dict(&self.objects, &state) || !matches!(self.top()?, Object::Dict { ordered: true, .. }) {
            return Err(Refusal::Call("for the state of something else than an ordered dictionary".into()));
        }
        Ok(())
    }

    fn tree(&self, value: &Value, depth: usize, nodes: &mut usize) -> Result<Tree, Refusal> {
        *nodes += 1;
        if depth > MAX_DEPTH {
            return Err(Refusal::Structure(format!("are nested more than {MAX_DEPTH} deep")));
        }
        if *nodes > MAX_NODES {
            return Err(Refusal::Structure(format!("are more than {MAX_NODES}")));
        }
        let object = match value {
            Value::None | Value::Global(Global::Dtype) => return Ok(Tree::None),
            Value::Bool(b) => return Ok(Tree::Bool(*b)),
            Value::Int(n) => return Ok(Tree::Int(*n)),
            Value::Float(x) => return Ok(Tree::Float(*x)),
            Value::Global(_) => return Err(Refusal::Structure("hold a function".into())),
            Value::Object(i) => &self.objects[*i],
        };
        match object {
            Object::Text(text) => {
                // A text counts by its length, or one remembered text could be repeated without end.
                *nodes += text.len() / 64;
                Ok(Tree::Text(text.clone()))
            }
            Object::Tuple(items) | Object::List(items) => Ok(Tree::List(
                items.iter().map(|v| self.tree(v, depth + 1, nodes)).collect::<Result<_, _>>()?,
            )),
            Object::Dict { items, .. } => {
                let mut all: Vec<(String, Tree)> = Vec::new();
                let mut seen = std::collections::HashSet::new();
                for (key, value) in items {
                    let key = self.text(key).ok_or_else(|| {
                        Refusal::Structure("hold a dictionary with a key that is no text".into())
                    })?;
                    if !seen.insert(key) {
                        return Err(Refusal::Structure(format!("hold the key {:?} twice", printable(key))));
                    }
                    *nodes += key.len() / 64;
                    all.push((key.to_owned(), self.tree(value, depth + 1, nodes)?));
                }
                Ok(Tree::Dict(all))
            }
            Object::Storage { .. } => Err(Refusal::Structure("hold a storage without a tensor".into())),
            Object::Tensor(tensor) => Ok(Tree::Tensor(tensor.clone())),
        }
    }
}

/// A name from a file, fit for a terminal.
fn printable(text: &str) -> String {
    text.chars().take(120).flat_map(char::escape_default).collect()
}
