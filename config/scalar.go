package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Format is a kind of text that a value of the file may have to be.
type Format struct {
	// Description says what the text looks like; it completes "must be …".
	Description string
	// Pattern is a regular expression for it, for the JSON schema; it may
	// accept more than the decoder.
	Pattern string
	check   func(string) bool
}

// Formats are the text formats that the format tag may name.
var Formats = map[string]Format{
	"dns-label": matching("1 to 63 lower-case letters, digits and inner hyphens", `^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`),
	"tty":       matching("the name of a console device, such as ttyS0", `^[a-zA-Z][a-zA-Z0-9]{0,31}$`),
	"glob": {
		Description: "a pattern of at most 64 characters without spaces, with * and ? as wildcards",
		Pattern:     `^[!-~]{1,64}$`,
		check: func(s string) bool {
			_, err := path.Match(s, "")
			return err == nil && len(s) <= 64 && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
		},
	},
	"text": {
		Description: "a text of at most 4096 bytes without control characters",
		Pattern:     `^[^\x00-\x1f\x7f]{0,4096}$`,
		check: func(s string) bool {
			return len(s) <= 4096 && utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
		},
	},
	"http-url": {
		Description: "an http:// URL whose host is an IP address, such as http://127.0.0.1/healthz",
		Pattern:     `^http://`,
		check: func(s string) bool {
			u, err := url.Parse(s)
			if err != nil || u.Scheme != "http" || u.User != nil || u.Fragment != "" || len(s) > 1024 {
				return false
			}
			_, err = netip.ParseAddr(u.Hostname())
			return err == nil && (u.Port() == "" || validPort(u.Port()))
		},
	},
	"syslog-url": {
		Description: "udp:// or tcp:// with an IP address and a port, such as udp://192.0.2.5:514",
		Pattern:     `^(udp|tcp)://(\[.+\]|[0-9.]+):[0-9]{1,5}$`,
		check: func(s string) bool {
			network, address, _ := strings.Cut(s, "://")
			ap, err := netip.ParseAddrPort(address)
			return err == nil && ap.Port() != 0 && (network == "udp" || network == "tcp")
		},
	},
	"host-port": {
		Description: "an IP address and a port, such as 127.0.0.1:25 or [::1]:25",
		Pattern:     `^(\[.+\]|[0-9.]+):[0-9]{1,5}$`,
		check: func(s string) bool {
			ap, err := netip.ParseAddrPort(s)
			return err == nil && ap.Port() != 0
		},
	},
}

func matching(description, pattern string) Format {
	return Format{Description: description, Pattern: pattern, check: regexp.MustCompile(pattern).MatchString}
}

func validPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// isScalar says whether a type is written as one YAML scalar.
func isScalar(t reflect.Type) bool {
	switch t {
	case typeOf[netip.Prefix](), typeOf[netip.Addr](), typeOf[net.HardwareAddr](), typeOf[time.Duration](), typeOf[Key](), typeOf[PortRange](), typeOf[Detect](), typeOf[int]():
		return true
	}
	return t.Kind() == reflect.String
}

func typeOf[T any]() reflect.Type { return reflect.TypeFor[T]() }

// setScalar parses text into v as the type and the field's tags say. The error
// is the end of a sentence that begins with the value's path.
func setScalar(v reflect.Value, tag reflect.StructTag, text string) error {
	var parsed any
	var err error
	switch v.Interface().(type) {
	case netip.Prefix:
		parsed, err = parsePrefix(text)
	case netip.Addr:
		parsed, err = parseAddr(text)
	case net.HardwareAddr:
		parsed, err = parseMAC(text)
	case time.Duration:
		parsed, err = parseDuration(text, tag)
	case Key:
		parsed, err = parseKey(text)
	case PortRange:
		parsed, err = parsePortRange(text)
	case Detect:
		parsed, err = parseDetect(text, tag)
	case int:
		parsed, err = parseInt(text, tag)
	default:
		if err = checkText(text, tag); err == nil {
			v.SetString(text)
		}
		return err
	}
	if err != nil {
		return err
	}
	v.Set(reflect.ValueOf(parsed))
	return nil
}

func checkText(text string, tag reflect.StructTag) error {
	if list := tag.Get("enum"); list != "" {
		allowed := strings.Split(list, ",")
		for _, a := range allowed {
			if text == a {
				return nil
			}
		}
		msg := fmt.Sprintf("%s is not one of %s", quote(text), strings.Join(allowed, ", "))
		if k := nearest(text, allowed); k != "" {
			msg += fmt.Sprintf("; did you mean %q?", k)
		}
		return errors.New(msg)
	}
	f, ok := Formats[tag.Get("format")]
	if !ok {
		f = Formats["text"]
	}
	if !f.check(text) {
		return fmt.Errorf("%s must be %s", quote(text), f.Description)
	}
	return nil
}

func parsePrefix(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		if a, err := netip.ParseAddr(text); err == nil {
			example := 24
			if a.Is6() {
				example = 64
			}
			return p, fmt.Errorf("%s has no prefix length; write the subnet's after a slash, such as %v/%d", quote(text), a, example)
		}
		return p, fmt.Errorf("%s must be an address and a prefix length, such as 10.77.0.10/24 or fd77::10/64", quote(text))
	}
	if p.Addr().Is4In6() {
		return p, fmt.Errorf("%s is an IPv4 address inside an IPv6 one; write it as %v", quote(text), p.Addr().Unmap())
	}
	return p, nil
}

func parseAddr(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	if err != nil {
		return a, fmt.Errorf("%s must be an IP address without a prefix length, such as 10.77.0.1 or fd77::1", quote(text))
	}
	if a.Zone() != "" {
		return a, fmt.Errorf("%s must not have a zone: every node has its own name for the NIC; write %v", quote(text), a.WithZone(""))
	}
	return a.Unmap(), nil
}

func parseMAC(text string) (net.HardwareAddr, error) {
	m, err := net.ParseMAC(text)
	if err != nil || len(m) != 6 || strings.Contains(text, ".") {
		return nil, fmt.Errorf("%s must be six bytes in hexadecimal with colons between them, such as 02:cc:0a:4d:00:0a", quote(text))
	}
	return m, nil
}

func parseDuration(text string, tag reflect.StructTag) (time.Duration, error) {
	least, most := tagDuration(tag, "min"), tagDuration(tag, "max")
	allowed := fmt.Sprintf("%s to %s", shortDuration(least), shortDuration(most))
	if tag.Get("zero") != "" {
		allowed = "0 (" + tag.Get("zero") + ") or " + allowed
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf("%s must be a time with its unit (ms, s, m or h), such as 500ms or 1m30s; allowed: %s", quote(text), allowed)
	}
	if d == 0 && tag.Get("zero") != "" {
		return 0, nil
	}
	if d < least || d > most {
		return 0, fmt.Errorf("%s is out of range; allowed: %s", text, allowed)
	}
	return d, nil
}

func tagDuration(tag reflect.StructTag, name string) time.Duration {
	d, err := time.ParseDuration(tag.Get(name))
	if err != nil {
		panic("config: a duration without a " + name + " tag")
	}
	return d
}

// shortDuration is d without the zero minutes and seconds of Duration.String.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func parseInt(text string, tag reflect.StructTag) (int, error) {
	least, most := tagCount(tag, "min"), tagCount(tag, "max")
	n, err := strconv.Atoi(text)
	if errors.Is(err, strconv.ErrSyntax) {
		return 0, fmt.Errorf("%s must be a whole number; allowed: %d to %d", quote(text), least, most)
	}
	if err != nil || n < least || n > most {
		return 0, fmt.Errorf("%s is out of range; allowed: %d to %d", quote(text), least, most)
	}
	return n, nil
}

// quote shows a value of the file in a message, cut to a readable length.
func quote(text string) string {
	if len(text) > 64 {
		text = text[:64] + "…"
	}
	return strconv.Quote(text)
}

// scalarText is the value as it would be written in the file, "" for an unset
// one; the key is hidden.
func scalarText(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case netip.Prefix:
		if !x.IsValid() {
			return ""
		}
		return x.String()
	case netip.Addr:
		if !x.IsValid() {
			return ""
		}
		return x.String()
	case time.Duration:
		return shortDuration(x)
	case int:
		return strconv.Itoa(x)
	case Key:
		if x == (Key{}) {
			return ""
		}
		return masked
	case fmt.Stringer:
		return x.String()
	}
	return v.String()
}

func listText(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return ""
	}
	return string(b)
}
