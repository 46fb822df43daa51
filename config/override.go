package config

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// Prefix begins the kernel parameters that override values of the file:
// clonecluster.system.log-level=debug. Services go by their name:
// clonecluster.services.web.affinity=client. Other lists of maps go by number,
// and the number after the last makes a new entry:
// clonecluster.policy.weights[0].weight=50. Lists of values are written with
// commas, one environment variable is services.NAME.env.VARIABLE. As everywhere
// in kernel parameters, _ may stand for -.
const Prefix = "clonecluster."

// StickParameter is about the boot and no value of the file. 1 says that the
// machine was booted from a stick, whose file is to be waited for; 0 that no
// stick is to be looked for.
const StickParameter = Prefix + "stick"

// Stick is the value of StickParameter on a kernel command line, "" without
// one; the last counts.
func Stick(cmdline string) string {
	value := ""
	for _, o := range parameters(cmdline) {
		if o.parameter == StickParameter {
			value = o.text
		}
	}
	return value
}

// override is one parameter: the path below Prefix, and the text after "=".
type override struct {
	parameter string // as written, without the value
	path      string
	text      string
}

// LoadWithCmdline is Load with the overrides of a kernel command line applied
// before anything is checked. An override that is unknown, malformed, or makes
// the whole contradict itself is left out and told in ignored, so that a typing
// error at a boot prompt costs the override and not the node; the caller says
// what comes of it. The error is about the file alone.
func LoadWithCmdline(data []byte, filename, cmdline string) (c *Config, ignored Problems, err error) {
	doc, problems := parse(data, filename)
	if len(problems) > 0 {
		return nil, nil, problems
	}
	overrides := parseCmdline(cmdline)
	if len(overrides) > maxOverrides {
		o := overrides[maxOverrides]
		ignored = append(ignored, &Problem{Where: o.parameter, Message: fmt.Sprintf("is one too many: only the first %d parameters are read", maxOverrides)})
		overrides = overrides[:maxOverrides]
	}
	for {
		c, problems = build(doc, overrides)
		if len(problems) == 0 {
			return c, ignored, nil
		}
		if len(overrides) == 0 {
			return nil, ignored, problems
		}
		kept := slices.DeleteFunc(slices.Clone(overrides), func(o override) bool {
			i := slices.IndexFunc(problems, func(p *Problem) bool { return p.about(o) })
			if i >= 0 {
				ignored = append(ignored, problems[i].of(o))
			}
			return i >= 0
		})
		if len(kept) == len(overrides) { // no problem names an override: the file itself may be wrong
			fileOnly, fileProblems := build(doc, nil)
			if len(fileProblems) > 0 {
				return nil, ignored, problems
			}
			for _, o := range overrides {
				ignored = append(ignored, problems[0].of(o))
			}
			return fileOnly, ignored, nil
		}
		overrides = kept
	}
}

const maxOverrides = 64

// about says whether dropping the override could end the problem.
func (p *Problem) about(o override) bool {
	if p.Where == o.parameter {
		return true
	}
	for _, path := range append([]string{p.Path}, p.related...) {
		if path == o.path || strings.HasPrefix(path, o.path+"[") || strings.HasPrefix(path, o.path+".") {
			return true
		}
	}
	return false
}

// of is the problem as one of the override.
func (p *Problem) of(o override) *Problem {
	return &Problem{Where: o.parameter, Path: p.Path, Message: p.Message, related: p.related}
}

// parseCmdline finds the parameters that are about values of the file.
func parseCmdline(cmdline string) []override {
	return slices.DeleteFunc(parameters(cmdline), func(o override) bool { return o.parameter == StickParameter })
}

// parameters finds our parameters. Quoting is the kernel's (lib/cmdline.c,
// next_arg): spaces end a parameter except between double quotes, and quotes
// around a value or around the whole are taken off. "--" ends the kernel's part.
func parameters(cmdline string) []override {
	var found []override
	quoted := false
	words := strings.FieldsFunc(cmdline, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return !quoted && (r == ' ' || r == '\t' || r == '\n')
	})
	for _, word := range words {
		if word == "--" {
			break
		}
		if len(word) > 1 && word[0] == '"' {
			word = strings.TrimSuffix(word[1:], `"`)
		}
		name, text, _ := strings.Cut(word, "=")
		if path, ok := strings.CutPrefix(name, Prefix); ok {
			if len(text) > 1 && text[0] == '"' {
				text = strings.TrimSuffix(text[1:], `"`)
			}
			found = append(found, override{parameter: name, path: path, text: text})
		}
	}
	return found
}

// override sets the value a parameter names.
func (b *builder) override(root reflect.Value, o override) *Problem {
	fail := func(path, format string, args ...any) *Problem {
		return &Problem{Where: o.parameter, Path: path, Message: fmt.Sprintf(format, args...)}
	}
	v, path := root, ""
	var tag reflect.StructTag
	// The number of an entry is a step of its own.
	steps := strings.Split(strings.ReplaceAll(o.path, "[", ".["), ".")
	for i, step := range steps {
		switch {
		case isScalar(v.Type()):
			return fail(path, "is one value; nothing can follow it")
		case v.Kind() == reflect.Struct:
			key := step
			if _, ok := fieldByKey(v.Type(), key); !ok {
				key = strings.ReplaceAll(step, "_", "-")
			}
			f, ok := fieldByKey(v.Type(), key)
			if !ok {
				return fail(path, "unknown name %s%s", quote(step), didYouMean(step, keysOf(v.Type())))
			}
			v, tag, path = v.FieldByIndex(f.Index), f.Tag, join(path, key)
		case v.Type() == typeOf[[]Service]():
			j := slices.IndexFunc(b.config.Services, func(s Service) bool {
				return s.Name == step || s.Name == strings.ReplaceAll(step, "_", "-")
			})
			if j < 0 {
				var names []string
				for _, s := range b.config.Services {
					names = append(names, s.Name)
				}
				return fail(path, "no service is called %s%s", quote(step), didYouMean(step, names))
			}
			path = b.servicePath(j)
			v = v.Index(j)
		case isRecords(v.Type()):
			j, err := record(step, v.Len())
			if err != nil {
				return fail(path, "%v", err)
			}
			path = indexed(path, j)
			if j == v.Len() {
				if most := tagCount(tag, "max"); j == most {
					return fail(path, "is one too many; at most %d are allowed", most)
				}
				v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
				b.mark(path, o)
			}
			v = v.Index(j)
		case v.Kind() == reflect.Map:
			if !envName.MatchString(step) || i != len(steps)-1 {
				return fail(path, "%s is not the name of an environment variable", quote(strings.Join(steps[i:], ".")))
			}
			if err := checkText(o.text, tag); err != nil {
				return fail(join(path, step), "%v", err)
			}
			if v.IsNil() {
				v.Set(reflect.MakeMap(v.Type()))
			}
			v.SetMapIndex(reflect.ValueOf(step), reflect.ValueOf(o.text))
			b.mark(join(path, step), o)
			b.mark(path, o)
			return nil
		default:
			return fail(path, "is a list; give all of it, with commas")
		}
	}
	switch {
	case path == "services.name" || strings.HasPrefix(path, "services.") && strings.HasSuffix(path, ".name") && strings.Count(path, ".") == 2:
		return fail(path, "a service's name cannot be overridden: it is how parameters find the service")
	case isScalar(v.Type()):
		if err := setScalar(v, tag, o.text); err != nil {
			return fail(path, "%v", err)
		}
	case v.Kind() == reflect.Slice && isScalar(v.Type().Elem()):
		if err := setList(v, tag, o.text); err != nil {
			return fail(path, "%v", err)
		}
	case v.Kind() == reflect.Struct:
		return fail(path, "is a section; name one of its values: %s", strings.Join(keysOf(v.Type()), ", "))
	default:
		return fail(path, "cannot be overridden as a whole; name one of its parts")
	}
	b.mark(path, o)
	return nil
}

// record is the number of an entry of a list of maps, "[0]", which has n
// entries now.
func record(step string, n int) (int, error) {
	if !strings.HasPrefix(step, "[") || !strings.HasSuffix(step, "]") {
		return 0, errors.New("is a list; say which entry, such as [0]")
	}
	i, err := strconv.Atoi(step[1 : len(step)-1])
	if err != nil || i < 0 || i > n {
		return 0, fmt.Errorf("%s is not the number of an entry; there are %d, and [%d] makes a new one", quote(step), n, n)
	}
	return i, nil
}

func setList(v reflect.Value, tag reflect.StructTag, text string) error {
	var items []string
	if text != "" {
		items = strings.Split(text, ",")
	}
	if most := tagCount(tag, "max"); len(items) > most {
		return fmt.Errorf("has %d entries; at most %d are allowed", len(items), most)
	}
	list := reflect.MakeSlice(v.Type(), len(items), len(items))
	for i, item := range items {
		if err := setScalar(list.Index(i), tag, item); err != nil {
			return err
		}
	}
	v.Set(list)
	return nil
}

func (b *builder) mark(path string, o override) {
	for p := range b.config.origins { // what the file gave for a list's items
		if strings.HasPrefix(p, path+"[") {
			delete(b.config.origins, p)
		}
	}
	b.config.origins[path] = origin{label: fromCmdline, where: o.parameter}
}
