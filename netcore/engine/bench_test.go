package engine_test

import (
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkHTTP compares the VIP of a cluster of one with the node's own address
// on the same server, in turns, so that a noisy machine disturbs both alike. The
// metric cpu-ratio is the processor time of client, server and engine together,
// divided by that of the plain server: 1 is the limit.
func BenchmarkHTTP(b *testing.B) {
	c := newCluster(b, 1)
	server := c.nodes[0].Start("httpd", "node1")
	server.Await(0, "httpd ready")
	c.nodes[0].start()
	c.agree(c.nodes...)
	targets := [2]string{"10.77.0.101", vip4}

	const size = 16 << 20
	for _, bm := range []struct {
		name      string
		keepAlive bool
		batch     int // requests between two changes of side
		do        func(client *http.Client, host string) error
	}{
		{"KeepAlive", true, 400, func(client *http.Client, host string) error {
			_, err := tryGet(client, "http://"+host+"/whoami")
			return err
		}},
		{"ConnectionPerRequest", false, 100, func(client *http.Client, host string) error {
			_, err := tryGet(client, "http://"+host+"/whoami")
			return err
		}},
		{"Download16MiB", true, 2, func(client *http.Client, host string) error {
			resp, err := client.Get(fmt.Sprintf("http://%s/download/%d", host, size))
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			n, err := io.Copy(io.Discard, resp.Body)
			if n != size {
				return fmt.Errorf("%d bytes, %w", n, err)
			}
			return nil
		}},
		{"Upload16MiB", true, 2, func(client *http.Client, host string) error {
			resp, err := client.Post("http://"+host+"/upload", "", io.LimitReader(&pattern{}, size))
			if err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			return err
		}},
	} {
		b.Run(bm.name, func(b *testing.B) {
			client := &http.Client{Transport: &http.Transport{DialContext: c.client.DialContext, DisableKeepAlives: !bm.keepAlive}}
			defer client.CloseIdleConnections()
			var cpu, wall [2]time.Duration
			n := 0
			for b.Loop() {
				n++
				for side, host := range targets {
					start, before := time.Now(), self(b)+server.CPU()+c.nodes[0].cloned.CPU()
					for range bm.batch {
						if err := bm.do(client, host); err != nil {
							b.Fatal(err)
						}
					}
					wall[side] += time.Since(start)
					cpu[side] += self(b) + server.CPU() + c.nodes[0].cloned.CPU() - before
				}
			}
			ops := float64(n * bm.batch)
			b.ReportMetric(float64(cpu[1])/float64(cpu[0]), "cpu-ratio")
			b.ReportMetric(float64(wall[1])/float64(wall[0]), "time-ratio")
			b.ReportMetric(float64(cpu[0].Microseconds())/ops, "plain-cpu-us/req")
			b.ReportMetric(float64(cpu[1].Microseconds())/ops, "clone-cpu-us/req")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// self is the processor time of this process, which is the client.
func self(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
