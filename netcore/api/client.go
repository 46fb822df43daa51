package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Client asks a cluster, or one node of it. It is for concurrent use.
type Client struct {
	tls  *tls.Config
	http *http.Client
	// Dial makes the connections; nil: net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Lost is told of what Follow did not get, as the node no longer had it. nil: nobody is.
	Lost func(n uint64)

	mu        sync.Mutex
	addresses []netip.AddrPort
}

// mostAnswer is more than a cluster of 255 nodes says.
const mostAnswer = 16 << 20

// NewClient makes a client that speaks TLS like that and asks at any of these
// addresses: the first that proves to be the cluster's.
func NewClient(conf *tls.Config, addresses ...netip.AddrPort) *Client {
	c := &Client{tls: conf, addresses: addresses}
	c.http = &http.Client{Transport: &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		MaxIdleConns:   2, MaxConnsPerHost: 16, IdleConnTimeout: 30 * time.Second, DisableCompression: true,
	}}
	return c
}

// SetAddresses changes where new connections go.
func (c *Client) SetAddresses(a ...netip.AddrPort) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.addresses = a
}

// Close closes connections that nobody uses.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// dial tries all addresses at the same time. One that does not prove to be of the
// cluster does not count.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	c.mu.Lock()
	addresses := c.addresses
	c.mu.Unlock()
	if len(addresses) == 0 {
		return nil, errors.New("no address to ask at")
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	type try struct {
		conn net.Conn
		err  error
	}
	tries := make(chan try)
	for _, a := range addresses {
		go func() {
			conn, err := c.dialOne(ctx, a)
			select {
			case tries <- try{conn, err}:
			case <-ctx.Done():
				if err == nil {
					_ = conn.Close()
				}
			}
		}()
	}
	var errs []error
	for range addresses {
		select {
		case t := <-tries:
			if t.err == nil {
				return t.conn, nil
			}
			errs = append(errs, t.err)
		case <-ctx.Done():
			return nil, errors.Join(append(errs, ctx.Err())...)
		}
	}
	return nil, errors.Join(errs...)
}

func (c *Client) dialOne(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
	dial := c.Dial
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	conn, err := dial(ctx, "tcp", a.String())
	if err != nil {
		return nil, err
	}
	secure := tls.Client(conn, c.tls)
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("%v: %w", a, explainTLS(err))
	}
	return secure, nil
}

// explainTLS says what to do about what TLS says of certificates.
func explainTLS(err error) error {
	var alert tls.AlertError
	var text string
	if errors.As(err, &alert) || strings.Contains(err.Error(), "remote error: tls") {
		text = err.Error()
	}
	switch {
	case strings.Contains(text, "expired certificate"):
		return fmt.Errorf("the certificate has expired; issue another with \"clonectl key issue\" (%w)", err)
	case strings.Contains(text, "certificate"):
		return fmt.Errorf("the cluster refuses this certificate, which was made with another cluster's key, or before its key was changed (%w)", err)
	case errors.As(err, new(*tls.CertificateVerificationError)):
		return fmt.Errorf("what answers is no node of this cluster, or one with another key (%w)", err)
	}
	return err
}

// Error is an answer of the API that is an error.
type Error struct {
	Code int // of HTTP
	Text string
}

func (e *Error) Error() string { return e.Text }

// raw asks and gives the answer whatever it is.
func (c *Client) raw(ctx context.Context, method, path string, query url.Values, body []byte, header http.Header) (*http.Response, error) {
	u := url.URL{Scheme: "https", Host: "cluster", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	if len(body) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	var inURL *url.Error
	if errors.As(err, &inURL) {
		err = inURL.Err // it names a URL that nobody gave
	}
	if err != nil {
		return nil, explainTLS(err)
	}
	return resp, nil
}

func (c *Client) ask(ctx context.Context, method, path string, query url.Values, body []byte, header http.Header) (*http.Response, error) {
	resp, err := c.raw(ctx, method, path, query, body, header)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	var p Problem
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&p); err != nil || p.Error == "" {
		p.Error = resp.Status
	}
	return nil, &Error{resp.StatusCode, p.Error}
}

// Open asks for something that is no JSON, of which the caller closes the body.
func (c *Client) Open(ctx context.Context, path string) (*http.Response, error) {
	return c.ask(ctx, http.MethodGet, path, nil, nil, nil)
}

// Get asks for something and reads the answer into out.
func (c *Client) Get(ctx context.Context, path string, query url.Values, out any) error {
	return c.do(ctx, http.MethodGet, path, query, nil, out)
}

// Post has something done and reads the answer into out.
func (c *Client) Post(ctx context.Context, path string, query url.Values, body, out any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	return c.do(ctx, http.MethodPost, path, query, data, out)
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values, body []byte, out any) error {
	resp, err := c.ask(ctx, method, path, query, body, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, mostAnswer)).Decode(out); err != nil {
		return fmt.Errorf("reading the answer to %s: %w", path, err)
	}
	return nil
}

// Stream asks for something that goes on and gives what comes, to be closed.
func (c *Client) Stream(ctx context.Context, path string, query url.Values) (io.ReadCloser, error) {
	resp, err := c.ask(ctx, http.MethodGet, path, query, nil, nil)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// Follow asks for server-sent events and hands on the data of each. It returns
// when ctx ends, when each returns an error, which is the result, or when the
// connection is lost.
func (c *Client) Follow(ctx context.Context, path string, query url.Values, each func(data []byte) error) error {
	resp, err := c.ask(ctx, http.MethodGet, path, query, nil, http.Header{"Accept": {"text/event-stream"}})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return readEvents(resp.Body, each, c.Lost)
}

// readEvents reads the data of server-sent events, each in one line, as the server
// here writes them, and what is said to be lost.
func readEvents(r io.Reader, each func(data []byte) error, lost func(n uint64)) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 4096), mostAnswer)
	for lines.Scan() {
		if data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data:")); ok {
			if err := each(bytes.TrimPrefix(data, []byte(" "))); err != nil {
				return err
			}
		} else if text, ok := strings.CutPrefix(lines.Text(), lostComment); ok && lost != nil {
			if n, err := strconv.ParseUint(text, 10, 64); err == nil {
				lost(n)
			}
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	return io.ErrUnexpectedEOF
}
