package evaluation

import (
	"bytes"
	"fmt"
	"html"
	"math"

	"clonecluster/netcore/webstone"
)

// A Line is one set-up in a drawing.
type Line struct {
	Name   string
	Points []LinePoint
}

// LinePoint is what was measured with so many clients.
type LinePoint struct {
	Clients  int
	Mbit     float64
	Response float64 // mean, in seconds
}

// LineOf is the line of results.
func LineOf(name string, results []*webstone.Result) Line {
	l := Line{Name: name}
	for _, r := range results {
		l.Points = append(l.Points, LinePoint{r.Clients, r.Median((*webstone.Window).Throughput), r.Total().Latency.Mean().Seconds()})
	}
	return l
}

// published are the lines that are drawn beside those that were measured.
func published() (lines []Line) {
	for _, p := range []struct {
		name   string
		points []webstone.Published
	}{
		{"published: one", webstone.PublishedOne},
		{"published: two", webstone.PublishedTwo},
		{"published: two, byLoad", webstone.PublishedByLoad},
		{"published: two, byRandom", webstone.PublishedByRandom},
	} {
		l := Line{Name: p.name}
		for _, q := range p.points {
			l.Points = append(l.Points, LinePoint(q))
		}
		lines = append(lines, l)
	}
	return lines
}

const (
	panelWidth, panelHeight = 620., 260.
	panelLeft               = 70.
	lineHeight              = 17.
	legendColumns           = 2
)

var colors = []string{"blue", "amber", "green", "red", "violet", "teal"}

// Drawing draws throughput and response time against clients, one line a set-up, with what
// was published in grey. The same lines give the same bytes.
func Drawing(title string, lines []Line) []byte {
	all := published()
	legend := lineHeight * math.Ceil(float64(len(lines)+len(all))/legendColumns)
	top := 44 + legend
	height := top + 2*(panelHeight+70)
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 %.0f" width="720" height="%.0f" role="img" aria-labelledby="t d" font-family="system-ui, sans-serif" font-size="12">
  <title id="t">%s</title>
  <desc id="d">Two plots against the number of clients: the throughput of the server in Mbit/s, and the mean response time in seconds. What was published is grey.</desc>
  <style>
    .t{fill:#0f172a;font-weight:600;font-size:13px}.s{fill:#475569}.g{stroke:#cbd5e1;stroke-width:1}
    .l{fill:none;stroke-width:2;stroke-linejoin:round}.thin{stroke-dasharray:5 3}.p{stroke-width:1.5}
    .blue{stroke:#1d4ed8}.amber{stroke:#b45309}.green{stroke:#15803d}.red{stroke:#b91c1c}.violet{stroke:#7e22ce}.teal{stroke:#0e7490}.grey{stroke:#64748b}
    @media (prefers-color-scheme: dark){svg{background:#0f172a}.t{fill:#f1f5f9}.s{fill:#cbd5e1}.g{stroke:#334155}.blue{stroke:#93c5fd}.amber{stroke:#fbbf24}.green{stroke:#4ade80}.red{stroke:#fca5a5}.violet{stroke:#d8b4fe}.teal{stroke:#67e8f9}.grey{stroke:#94a3b8}}
  </style>
  <text class="t" x="%.0f" y="24">%s</text>
`, height, height, html.EscapeString(title), panelLeft, html.EscapeString(title))
	classes := make([]string, 0, len(lines)+len(all))
	for i := range lines {
		class := colors[i%len(colors)]
		if i/len(colors)%2 == 1 {
			class += " thin"
		}
		classes = append(classes, class)
	}
	for range all {
		classes = append(classes, "grey p thin")
	}
	lines = append(append([]Line{}, lines...), all...)
	marks := len(lines) - len(all)
	for i, l := range lines {
		x, y := panelLeft+panelWidth/legendColumns*float64(i%legendColumns), 44+lineHeight*float64(i/legendColumns)
		fmt.Fprintf(&b, `  <path class="l %s" d="M%.0f %.0fh24"/>`, classes[i], x, y-4)
		mark(&b, classes[i], i-marks, x+12, y-4)
		fmt.Fprintf(&b, `<text class="s" x="%.0f" y="%.0f">%s</text>`+"\n", x+32, y, html.EscapeString(l.Name))
	}
	clients := 0.
	for _, l := range lines {
		for _, p := range l.Points {
			clients = max(clients, float64(p.Clients))
		}
	}
	for i, panel := range []struct {
		title string
		of    func(LinePoint) float64
		clip  bool
	}{
		{"Throughput, Mbit/s", func(p LinePoint) float64 { return p.Mbit }, false},
		{"Mean response time, seconds", func(p LinePoint) float64 { return p.Response }, false},
	} {
		y := top + 24 + float64(i)*(panelHeight+70)
		most := 0.
		for _, l := range lines {
			for _, p := range l.Points {
				most = max(most, panel.of(p))
			}
		}
		step, end := ticks(most)
		xStep, xEnd := ticks(clients)
		across := func(n float64) float64 { return panelLeft + panelWidth*n/xEnd }
		up := func(v float64) float64 { return y + panelHeight*(1-v/end) }
		fmt.Fprintf(&b, `  <text class="t" x="%.0f" y="%.0f">%s</text>`+"\n", panelLeft, y-10, panel.title)
		for k := 0; float64(k)*step <= end*1.0001; k++ {
			v := float64(k) * step
			fmt.Fprintf(&b, `  <path class="g" d="M%.0f %.1fh%.0f"/><text class="s" x="%.0f" y="%.1f" text-anchor="end">%.4g</text>`+"\n", panelLeft, up(v), panelWidth, panelLeft-6, up(v)+4, v)
		}
		for k := 0; float64(k)*xStep <= xEnd*1.0001; k++ {
			v := float64(k) * xStep
			fmt.Fprintf(&b, `  <path class="g" d="M%.1f %.1fv4"/><text class="s" x="%.1f" y="%.0f" text-anchor="middle">%.4g</text>`+"\n", across(v), y+panelHeight, across(v), y+panelHeight+17, v)
		}
		fmt.Fprintf(&b, `  <text class="s" x="%.0f" y="%.0f" text-anchor="middle">clients</text>`+"\n", panelLeft+panelWidth/2, y+panelHeight+33)
		for j, l := range lines {
			d := byte('M')
			var path bytes.Buffer
			for _, p := range l.Points {
				v := panel.of(p)
				if v <= 0 && j >= marks {
					continue // not known
				}
				fmt.Fprintf(&path, "%c%.1f %.1f", d, across(float64(p.Clients)), up(v))
				d = 'L'
				mark(&b, classes[j], j-marks, across(float64(p.Clients)), up(v))
			}
			if path.Len() > 0 {
				fmt.Fprintf(&b, `  <path class="l %s" d="%s"/>`+"\n", classes[j], path.String())
			}
		}
	}
	fmt.Fprint(&b, "</svg>\n")
	return b.Bytes()
}

// mark draws a point: a small disc, and one of four signs for those that were published.
func mark(b *bytes.Buffer, class string, published int, x, y float64) {
	d := ""
	switch published {
	case 0:
		d = fmt.Sprintf("M%.1f %.1fl8 8m0 -8l-8 8", x-4, y-4)
	case 1:
		d = fmt.Sprintf("M%.1f %.1fh10m-5 -5v10", x-5, y)
	case 2:
		d = fmt.Sprintf("M%.1f %.1fl5 9h-10z", x, y-5)
	case 3:
		d = fmt.Sprintf("M%.1f %.1fh8v8h-8z", x-4, y-4)
	default:
		fmt.Fprintf(b, `<circle class="l %s" cx="%.1f" cy="%.1f" r="2"/>`+"\n", class, x, y)
		return
	}
	fmt.Fprintf(b, `<path class="l %s" stroke-dasharray="none" style="stroke-dasharray:none" d="%s"/>`+"\n", class, d)
}

// ticks gives a step of 1, 2 or 5 by a power of ten, and an end of four to nine steps.
func ticks(most float64) (step, end float64) {
	if most <= 0 {
		return 1, 4
	}
	step = math.Pow(10, math.Floor(math.Log10(most)))
	for _, part := range []float64{.1, .2, .5, 1} {
		if n := math.Ceil(most / (step * part) * .9999); n <= 9 {
			return step * part, n * step * part
		}
	}
	return step, math.Ceil(most/step) * step
}
