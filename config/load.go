package config

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// The limits of a file: it may come from a stick that anybody has had in hand.
const (
	MaxBytes  = 1 << 20 // of the whole file
	maxTokens = 20_000  // of YAML; a real file has a few hundred
	maxDepth  = 16      // of lists and maps within each other; the types need 5
)

// Load reads the text of a cluster.yaml. The name is what messages call the
// file. The error is a Problems with every problem that was found.
func Load(data []byte, filename string) (*Config, error) {
	doc, problems := parse(data, filename)
	if len(problems) == 0 {
		var c *Config
		if c, problems = build(doc, nil); len(problems) == 0 {
			return c, nil
		}
	}
	return nil, problems.err()
}

// LoadFile is Load of the file at path.
func LoadFile(path string) (*Config, error) {
	data, err := ReadFile(path)
	if err != nil {
		return nil, err
	}
	return Load(data, path)
}

// ReadFile reads a file of at most MaxBytes.
func ReadFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the cluster's configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxBytes+1)) // one more, so that Load sees that it is too long
	if err != nil {
		return nil, fmt.Errorf("reading the cluster's configuration: %w", err)
	}
	return data, nil
}

// origin is where a value came from.
type origin struct {
	label        string // "default", "derived", "cmdline", "file:line"
	where        string // for messages: "file:line:column" or the parameter
	line, column int    // in the file; 0 elsewhere
}

type origins map[string]origin

const (
	fromDefault = "default"
	fromDerived = "derived"
	fromCmdline = "cmdline"
)

// document is a parsed file: the source for messages, and the tree.
type document struct {
	*source
	root ast.Node // nil for an empty file
}

// parse makes the tree, and keeps everything from it that the decoder does not
// want to see: what YAML offers beyond maps, lists and scalars is refused, as
// no cluster.yaml needs it and each is a way to make a small file large or a
// reader of it wrong.
func parse(data []byte, filename string) (doc *document, problems Problems) {
	src := &source{name: filename} // without lines to show until it is known to be text
	fail := func(line, column int, message string) (*document, Problems) {
		return nil, Problems{src.problem(line, column, "", message)}
	}
	if len(data) > MaxBytes {
		return fail(1, 1, fmt.Sprintf("the file is larger than %d bytes", MaxBytes))
	}
	text := strings.TrimPrefix(string(data), "\ufeff")
	if i := invalidText(text); i >= 0 {
		line := 1 + strings.Count(text[:i], "\n")
		column := 1 + utf8.RuneCountInString(text[strings.LastIndexByte(text[:i], '\n')+1:i])
		return fail(line, column, "is not plain UTF-8 text from here on; save it as UTF-8, without control characters")
	}
	src = newSource(filename, text)
	// A panic of the YAML library must not be one of PID 1.
	defer func() {
		if r := recover(); r != nil {
			doc, problems = fail(1, 1, fmt.Sprint("the YAML reader gave up on the file: ", r))
		}
	}()
	tokens := lexer.Tokenize(text)
	if bad, message := refused(tokens); bad != nil {
		return fail(bad.Position.Line, bad.Position.Column, message)
	}
	file, err := parser.Parse(tokens, 0)
	if err != nil {
		var at interface {
			GetToken() *token.Token
			GetMessage() string
		}
		if errors.As(err, &at) && at.GetToken() != nil && at.GetToken().Position != nil {
			p := at.GetToken().Position
			return fail(p.Line, p.Column, yamlMessage(at.GetMessage()))
		}
		return fail(1, 1, "is not YAML")
	}
	doc = &document{source: src}
	for _, d := range file.Docs {
		if d.Body == nil || d.Body.Type() == ast.CommentType {
			continue
		}
		if doc.root != nil {
			p := d.Body.GetToken().Position
			return fail(p.Line, p.Column, "a second YAML document begins here; the file must hold one")
		}
		doc.root = d.Body
	}
	return doc, nil
}

// invalidText is the index of the first byte that is not UTF-8 or is a control
// character other than tab and line ends, or -1.
func invalidText(s string) int {
	for i, r := range s {
		if r == utf8.RuneError && !strings.HasPrefix(s[i:], "\ufffd") || r < ' ' && r != '\n' && r != '\r' && r != '\t' || r == 0x7f {
			return i
		}
	}
	return -1
}

// refused finds what of YAML a cluster.yaml may not use, before the parser,
// which recurses, sees it.
func refused(tokens token.Tokens) (*token.Token, string) {
	flow := 0
	var indents []int // columns of the block maps and lists that are open
	for i, t := range tokens {
		if t.Position == nil {
			continue
		}
		switch t.Type {
		case token.AnchorType, token.AliasType:
			return t, "anchors (&) and aliases (*) are not allowed; write the value out, or put a text that begins so in quotes"
		case token.MergeKeyType:
			return t, "merge keys (<<) are not allowed; write the values out"
		case token.TagType:
			return t, "tags (!) are not allowed; put a text that begins so in quotes"
		case token.DirectiveType:
			return t, "directives (%) are not allowed"
		case token.MappingKeyType:
			return t, "keys with ? are not allowed; write key: value"
		case token.MappingStartType, token.SequenceStartType:
			flow++
		case token.MappingEndType, token.SequenceEndType:
			flow--
		default:
			if flow > 0 || t.Type == token.CommentType {
				break
			}
			for len(indents) > 0 && indents[len(indents)-1] > t.Position.Column {
				indents = indents[:len(indents)-1]
			}
			structural := t.Type == token.SequenceEntryType || i+1 < len(tokens) && tokens[i+1].Type == token.MappingValueType
			if structural && (len(indents) == 0 || indents[len(indents)-1] < t.Position.Column) {
				indents = append(indents, t.Position.Column)
			}
		}
		if flow+len(indents) > maxDepth {
			return t, fmt.Sprintf("more than %d lists and maps inside each other", maxDepth)
		}
		if i > maxTokens {
			return t, fmt.Sprintf("the file has more than %d elements", maxTokens)
		}
	}
	return nil, ""
}

var alreadyDefined = regexp.MustCompile(`mapping key (".*") already defined at \[(\d+):\d+\]`)

// yamlMessage makes a parser's message that of somebody who explains.
func yamlMessage(m string) string {
	if sub := alreadyDefined.FindStringSubmatch(m); sub != nil {
		return fmt.Sprintf("the key %s is here a second time; the first is in line %s", sub[1], sub[2])
	}
	if strings.Contains(m, "tab") || strings.Contains(m, "'\t'") {
		return "YAML does not allow a tab here; indent with spaces"
	}
	return "is not valid YAML: " + m
}

// build makes a Config of a parsed file and the overrides, or says what is
// wrong with them. It has no side effects and can be called again with fewer
// overrides.
func build(doc *document, overrides []override) (*Config, Problems) {
	b := &builder{source: doc.source, config: &Config{origins: origins{}}}
	root := reflect.ValueOf(b.config).Elem()
	if doc.root != nil {
		b.decodeStruct(doc.root, root, "")
	}
	for _, o := range overrides {
		if p := b.override(root, o); p != nil {
			b.problems = append(b.problems, p)
		}
	}
	b.fill(root, "")
	if len(b.problems) == 0 {
		b.validate()
	}
	if len(b.problems) > 0 {
		return nil, b.problems.sorted()
	}
	return b.config, nil
}

type builder struct {
	*source
	config   *Config
	problems Problems
}

func (b *builder) fail(n ast.Node, path, format string, args ...any) {
	p := position(n)
	b.problems = append(b.problems, b.problem(p.Line, p.Column, path, fmt.Sprintf(format, args...)))
}

// failAt reports a problem of values that are already in place, where the first
// of the paths that has a position is.
func (b *builder) failAt(message string, paths ...string) {
	p := &Problem{Where: b.name, Path: paths[0], Message: message, related: paths[1:]}
	for _, path := range paths {
		if o, ok := b.at(path); ok {
			p.Where = o.where
			if o.line > 0 {
				p.line, p.column, p.Snippet = o.line, o.column, b.snippet(o.line, o.column, path)
			}
			break
		}
	}
	b.problems = append(b.problems, p)
}

// at finds the origin of the path, or of what it is part of.
func (b *builder) at(path string) (origin, bool) {
	for {
		if o, ok := b.config.origins[path]; ok && o.where != "" {
			return o, true
		}
		i := strings.LastIndexAny(path, ".[")
		if i < 0 {
			return origin{}, false
		}
		path = path[:i]
	}
}

func (b *builder) note(path string, n ast.Node) {
	p := position(n)
	b.config.origins[path] = origin{
		label:  b.name + ":" + strconv.Itoa(p.Line),
		where:  b.name + ":" + strconv.Itoa(p.Line) + ":" + strconv.Itoa(p.Column),
		line:   p.Line,
		column: p.Column,
	}
}

func position(n ast.Node) token.Position {
	if n != nil {
		if m, ok := n.(*ast.MappingNode); ok && !m.IsFlowStyle && len(m.Values) > 0 {
			n = m.Values[0].Key // its own token is the first colon
		}
		if m, ok := n.(*ast.MappingValueNode); ok {
			n = m.Key
		}
		if t := n.GetToken(); t != nil && t.Position != nil {
			return *t.Position
		}
	}
	return token.Position{Line: 1, Column: 1}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// entry is one key of a map with the value of it.
type entry struct {
	key   string
	node  ast.Node // of the key
	value ast.Node
}

// entries gives the keys of a map; ok is false, and the problem reported, if
// the node is something else. Nothing after the colon is an empty map: so is a
// section whose keys are all commented out.
func (b *builder) entries(n ast.Node, path string) (all []entry, ok bool) {
	var values []*ast.MappingValueNode
	switch m := n.(type) {
	case *ast.MappingNode:
		values = m.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{m}
	case *ast.NullNode:
		return nil, true
	default:
		b.fail(n, path, "is %s where keys with values are wanted (key: value)", kind(n))
		return nil, false
	}
	for _, v := range values {
		key, ok := scalarOf(v.Key)
		if !ok {
			b.fail(v.Key, path, "a key must be a plain word")
			continue
		}
		all = append(all, entry{key, v.Key, v.Value})
	}
	return all, true
}

func (b *builder) decodeStruct(n ast.Node, v reflect.Value, path string) {
	all, ok := b.entries(n, path)
	if !ok {
		return
	}
	for _, e := range all {
		f, ok := fieldByKey(v.Type(), e.key)
		if !ok {
			b.fail(e.node, path, "unknown key %s%s", quote(e.key), didYouMean(e.key, keysOf(v.Type())))
			continue
		}
		b.note(join(path, e.key), e.value)
		b.decode(e.value, v.FieldByIndex(f.Index), f.Tag, join(path, e.key))
	}
}

func (b *builder) decode(n ast.Node, v reflect.Value, tag reflect.StructTag, path string) {
	switch {
	case isScalar(v.Type()):
		b.decodeScalar(n, v, tag, path)
	case v.Kind() == reflect.Struct:
		b.decodeStruct(n, v, path)
	case v.Kind() == reflect.Slice:
		b.decodeList(n, v, tag, path)
	case v.Kind() == reflect.Map:
		b.decodeMap(n, v, tag, path)
	default:
		panic("config: no decoder for " + v.Type().String())
	}
}

func (b *builder) decodeScalar(n ast.Node, v reflect.Value, tag reflect.StructTag, path string) {
	text, ok := scalarOf(n)
	if !ok {
		if n.Type() == ast.NullType {
			b.fail(n, path, "has no value; give one, or leave the key out")
		} else {
			b.fail(n, path, "is %s where one value is wanted", kind(n))
		}
		return
	}
	if v.Kind() == reflect.String && n.Type() != ast.StringType && n.Type() != ast.LiteralType {
		b.fail(n, path, "is %s where a text is wanted; if it is meant as text, put it in quotes: %q", kind(n), text)
		return
	}
	if err := setScalar(v, tag, text); err != nil {
		b.fail(n, path, "%v", err)
	}
}

func (b *builder) decodeList(n ast.Node, v reflect.Value, tag reflect.StructTag, path string) {
	if n.Type() == ast.NullType {
		return
	}
	seq, ok := n.(*ast.SequenceNode)
	if !ok {
		b.fail(n, path, "is %s where a list is wanted ([a, b], or one line with \"- \" for each)", kind(n))
		return
	}
	if most := tagCount(tag, "max"); len(seq.Values) > most {
		b.fail(n, path, "has %d entries; at most %d are allowed", len(seq.Values), most)
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(seq.Values), len(seq.Values)))
	for i, item := range seq.Values {
		p := indexed(path, i)
		if v.Type() == typeOf[[]Service]() {
			p = b.pathOfService(item, i)
		}
		b.note(p, item)
		b.decode(item, v.Index(i), tag, p)
	}
}

func indexed(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

// pathOfService has the service's name in it, so that paths stay the same when
// the order in the file changes; its number if it has no usable name.
func (b *builder) pathOfService(n ast.Node, i int) string {
	if m, ok := n.(*ast.MappingNode); ok {
		for _, kv := range m.Values {
			if k, _ := scalarOf(kv.Key); k == "name" {
				name, _ := scalarOf(kv.Value)
				if _, taken := b.config.origins["services."+name]; !taken && Formats["dns-label"].check(name) {
					return "services." + name
				}
			}
		}
	}
	return indexed("services", i)
}

var envName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,63}$`)

func (b *builder) decodeMap(n ast.Node, v reflect.Value, tag reflect.StructTag, path string) {
	all, ok := b.entries(n, path)
	if !ok {
		return
	}
	if most := tagCount(tag, "max"); len(all) > most {
		b.fail(n, path, "has %d entries; at most %d are allowed", len(all), most)
		return
	}
	v.Set(reflect.MakeMap(v.Type()))
	for _, e := range all {
		if !envName.MatchString(e.key) {
			b.fail(e.node, path, "%s must be letters, digits and underscores, at most 64, and not begin with a digit", quote(e.key))
			continue
		}
		item := reflect.New(v.Type().Elem()).Elem()
		b.note(join(path, e.key), e.value)
		b.decode(e.value, item, tag, join(path, e.key))
		v.SetMapIndex(reflect.ValueOf(e.key), item)
	}
}

func tagCount(tag reflect.StructTag, name string) int {
	n, err := strconv.Atoi(tag.Get(name))
	if err != nil {
		panic("config: a list, map or number without a " + name + " tag")
	}
	return n
}

// fill gives every value that is not set its default, and reports the required
// ones that have none.
func (b *builder) fill(v reflect.Value, path string) {
	for _, f := range reflect.VisibleFields(v.Type()) {
		key := f.Tag.Get("yaml")
		if key == "" {
			continue
		}
		p, value := join(path, key), v.FieldByIndex(f.Index)
		_, set := b.config.origins[p]
		if f.Tag.Get("required") != "" && !set && !b.anyBelow(p) {
			message := "is missing"
			if value.Type() == typeOf[Key]() {
				message = "is missing; " + newKey
			}
			b.failAt(message, p)
			continue
		}
		switch {
		case isScalar(value.Type()):
			if set {
				break
			}
			b.config.origins[p] = origin{label: fromDefault}
			if d := f.Tag.Get("default"); d != "" {
				if err := setScalar(value, f.Tag, d); err != nil {
					panic("config: the default of " + p + " " + err.Error())
				}
			}
		case value.Kind() == reflect.Struct:
			b.fill(value, p)
		case isRecords(value.Type()):
			for i := range value.Len() {
				b.fill(value.Index(i), b.recordPath(p, value.Type(), i))
			}
		default:
			if !set {
				b.config.origins[p] = origin{label: fromDefault}
			} else if least := f.Tag.Get("min"); least != "" && value.Len() < tagCount(f.Tag, "min") && !b.failed(p) {
				b.failAt("must have at least "+least+" entry", p)
			}
		}
	}
}

func (b *builder) failed(path string) bool {
	return slices.ContainsFunc(b.problems, func(p *Problem) bool { return p.Path == path })
}

func (b *builder) anyBelow(path string) bool {
	for p := range b.config.origins {
		if strings.HasPrefix(p, path+".") {
			return true
		}
	}
	return false
}

// isRecords says whether a type is a list of maps.
func isRecords(t reflect.Type) bool {
	return t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct && !isScalar(t.Elem())
}

// recordPath is the path that decodeList gave an entry of a list of maps.
func (b *builder) recordPath(path string, list reflect.Type, i int) string {
	if list == typeOf[[]Service]() {
		return b.servicePath(i)
	}
	return indexed(path, i)
}

// servicePath is the path that decodeList gave the service with this index.
func (b *builder) servicePath(i int) string {
	p := indexed("services", i)
	if _, numbered := b.config.origins[p]; numbered {
		return p
	}
	return "services." + b.config.Services[i].Name
}

// scalarOf is the text of a scalar as it stands in the file, quotes removed.
func scalarOf(n ast.Node) (string, bool) {
	switch s := n.(type) {
	case *ast.StringNode:
		return s.Value, true
	case *ast.LiteralNode:
		return s.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	}
	return "", false
}

func kind(n ast.Node) string {
	switch n.Type() {
	case ast.StringType, ast.LiteralType:
		return "a text"
	case ast.IntegerType, ast.FloatType, ast.InfinityType, ast.NanType:
		return "a number"
	case ast.BoolType:
		return "a yes-or-no value"
	case ast.NullType:
		return "empty"
	case ast.SequenceType:
		return "a list"
	case ast.MappingType, ast.MappingValueType:
		return "a map"
	}
	return "something else"
}

func fieldByKey(t reflect.Type, key string) (reflect.StructField, bool) {
	for _, f := range reflect.VisibleFields(t) {
		if k := f.Tag.Get("yaml"); k != "" && k == key {
			return f, true
		}
	}
	return reflect.StructField{}, false
}

func keysOf(t reflect.Type) []string {
	var keys []string
	for _, f := range reflect.VisibleFields(t) {
		if k := f.Tag.Get("yaml"); k != "" {
			keys = append(keys, k)
		}
	}
	return keys
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
