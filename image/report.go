package image

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
)

// Quantity is something the appliance costs. The zero value is not valid.
type Quantity string

// The quantities, in the order of a report.
const (
	KernelSize      Quantity = "kernel"             // bzImage
	BaseSize        Quantity = "base"               // base initramfs as loaded
	BaseUnpacked    Quantity = "base_unpacked"      // and in memory
	ConfigSize      Quantity = "config"             // the cluster's own initramfs
	TotalSize       Quantity = "total"              // all that is loaded at boot
	BootToHTTPReady Quantity = "boot_to_http_ready" // from the start of the machine
	InitRSS         Quantity = "init_rss"           // resident memory once ready
	EngineRSS       Quantity = "engine_rss"
	ServiceRSS      Quantity = "service_rss"
)

var quantities = []Quantity{KernelSize, BaseSize, BaseUnpacked, ConfigSize, TotalSize, BootToHTTPReady, InitRSS, EngineRSS, ServiceRSS}

// duration says whether the quantity is a time in nanoseconds; the others are
// sizes in bytes.
func (q Quantity) duration() bool { return q == BootToHTTPReady }

func (q Quantity) format(v int64) string {
	if q.duration() {
		return time.Duration(v).Round(10 * time.Millisecond).String()
	}
	return size(v)
}

// Row is one line of a report: bytes or nanoseconds; a budget of 0 means none.
type Row struct {
	Quantity Quantity `json:"quantity"`
	Value    int64    `json:"value"`
	Budget   int64    `json:"budget,omitempty"`
	Note     string   `json:"note,omitempty"` // where the value comes from
}

// Over says that the value is above its budget.
func (r Row) Over() bool { return r.Budget > 0 && r.Value > r.Budget }

// Report is the cost of an image of one board against its budgets.
type Report struct {
	Board   string
	budgets map[Quantity]int64
	rows    map[Quantity]Row
}

//go:embed budgets.yaml
var budgetsYAML []byte

// NewReport starts a report with the budgets of the board. A board without
// budgets is no error.
func NewReport(board string) (*Report, error) {
	all, err := parseBudgets(budgetsYAML)
	if err != nil {
		return nil, fmt.Errorf("reading budgets.yaml: %w", err)
	}
	return &Report{Board: board, budgets: all[board], rows: map[Quantity]Row{}}, nil
}

func parseBudgets(data []byte) (map[string]map[Quantity]int64, error) {
	var text map[string]map[string]string
	if err := yaml.Unmarshal(data, &text); err != nil {
		return nil, err
	}
	all := map[string]map[Quantity]int64{}
	for board, values := range text {
		all[board] = map[Quantity]int64{}
		for name, value := range values {
			q := Quantity(name)
			if !slices.Contains(quantities, q) {
				return nil, fmt.Errorf("%s: unknown quantity %q; known are %v", board, name, quantities)
			}
			v, err := parseBudget(value, q.duration())
			if err != nil {
				return nil, fmt.Errorf("%s: %s: %w", board, name, err)
			}
			all[board][q] = v
		}
	}
	return all, nil
}

func parseBudget(s string, isDuration bool) (int64, error) {
	if isDuration {
		d, err := time.ParseDuration(s)
		if err == nil && d <= 0 {
			err = fmt.Errorf("%q: want more than 0", s)
		}
		return int64(d), err
	}
	for _, u := range []struct {
		suffix string
		factor float64
	}{{"MB", 1e6}, {"kB", 1e3}, {"B", 1}} {
		if number, ok := strings.CutSuffix(s, u.suffix); ok {
			v, err := strconv.ParseFloat(number, 64)
			if err != nil || !(v > 0 && v*u.factor < 1e15) {
				break
			}
			return int64(v * u.factor), nil
		}
	}
	return 0, fmt.Errorf("%q: want a size like 4.5MB, 16kB or 512B", s)
}

// Set enters a value in bytes or nanoseconds. The note says where it is from.
func (r *Report) Set(q Quantity, value int64, note string) {
	r.rows[q] = Row{Quantity: q, Value: value, Budget: r.budgets[q], Note: note}
}

// Files enters the sizes of the files that are loaded at boot. An empty path is
// left out, and so is the total then.
func (r *Report) Files(kernel, base, config string) error {
	total, missing := int64(0), false
	for _, f := range []struct {
		q    Quantity
		path string
	}{{KernelSize, kernel}, {BaseSize, base}, {ConfigSize, config}} {
		if f.path == "" {
			missing = true
			continue
		}
		data, err := os.ReadFile(f.path)
		if err != nil {
			return fmt.Errorf("measuring the image: %w", err)
		}
		total += int64(len(data))
		r.Set(f.q, int64(len(data)), f.path)
		if f.q == BaseSize {
			r.Set(BaseUnpacked, Unpacked(data), "")
		}
	}
	if !missing {
		r.Set(TotalSize, total, "loaded at boot")
	}
	return nil
}

// Rows gives what was entered, in a fixed order.
func (r *Report) Rows() []Row {
	rows := slices.Collect(maps.Values(r.rows))
	slices.SortFunc(rows, func(a, b Row) int {
		return slices.Index(quantities, a.Quantity) - slices.Index(quantities, b.Quantity)
	})
	return rows
}

// Check is an error that names every value above its budget.
func (r *Report) Check() error {
	var errs []error
	for _, row := range r.Rows() {
		if row.Over() {
			errs = append(errs, fmt.Errorf("%s of %s: %s is above the budget of %s", row.Quantity, r.Board,
				row.Quantity.format(row.Value), row.Quantity.format(row.Budget)))
		}
	}
	return errors.Join(errs...)
}

// Print writes the report as "plain" text, "markdown" or "json".
func (r *Report) Print(w io.Writer, format string) error {
	rows := r.Rows()
	switch format {
	case "json":
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(struct {
			Board string `json:"board"`
			Rows  []Row  `json:"rows"`
		}{r.Board, rows})
	case "markdown":
		fmt.Fprintf(w, "| %s | value | budget | |\n|---|---:|---:|---|\n", r.Board)
		for _, row := range rows {
			fmt.Fprintf(w, "| %s | %s | %s | %s |\n", row.Quantity, row.Quantity.format(row.Value), row.budget(), row.remark())
		}
		return nil
	case "plain":
		name := len(r.Board)
		for _, row := range rows {
			name = max(name, len(row.Quantity))
		}
		fmt.Fprintf(w, "%-*s  %9s  %9s\n", name, r.Board, "value", "budget")
		for _, row := range rows {
			line := fmt.Sprintf("%-*s  %9s  %9s  %s", name, row.Quantity, row.Quantity.format(row.Value), row.budget(), row.remark())
			fmt.Fprintln(w, strings.TrimRight(line, " "))
		}
		return nil
	}
	return fmt.Errorf("format %q: want plain, markdown or json", format)
}

func (r Row) budget() string {
	if r.Budget == 0 {
		return "–"
	}
	return r.Quantity.format(r.Budget)
}

func (r Row) remark() string {
	if r.Over() {
		return strings.TrimSpace("OVER BUDGET " + r.Note)
	}
	return r.Note
}

// size writes bytes for people: 512 B, 16.4 kB, 3.1 MB.
func size(n int64) string {
	switch {
	case n < 1e3:
		return fmt.Sprintf("%d B", n)
	case n < 1e6:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}
